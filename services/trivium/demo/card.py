"""The model cards that `train` writes beside the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trivium.demo import dialogue_corpus, translation_corpus
from trivium.demo.evaluate import Scores, table
from trivium.demo.translation_lexicon import NOUNS


@dataclass(frozen=True)
class Facts:
    """What a training run has to tell about itself."""

    parameters: int
    steps: int
    seed: int
    minutes: float
    scores: Scores
    by_prefix: Scores | None = None


_TRANSLATE = """---
license: apache-2.0
language: [en, fr, de, es]
pipeline_tag: translation
---

# trivium-translate

A T5 v1.1 encoder-decoder of {parameters:,} parameters (width 128, three layers on each side, gated GELU, tied
embeddings, byte-level BPE of 800 tokens, weights in float16) that translates English into French, German or Spanish
over a closed world. It ships with the Trivium server so that its first answer needs no network.

## Use

The target language is the first decoder token after the start token: the decoder begins with `<pad><fr>`,
`<pad><de>` or `<pad><es>`. Without it, a prefix in the source ("to German: ", "translate English to Spanish: ")
decides, and a source without prefix is translated into French.

## Data

Written by `trivium.demo.translation_corpus` from small lexicons and grammars; nothing was collected.

- cardinal numbers in words from 0 to 9,999, alone or before one of {nouns} nouns, with or without an adjective,
  with the agreement that each language asks for;
- dates in figures and in words, with or without weekday and year;
- clock times in words (to five minutes) and in figures (to the minute), alone and in sentences;
- weekdays, months, set phrases, and short sentences built by grammar: "the red house is big", "where is the
  station?", "I would like two coffees, please".

Spelling conventions: traditional French hyphens ("cent vingt et un"), German "einhundert" and "eintausend", Spanish
"primero de enero". Case and full stop follow the source.

## Training

`python -m trivium.demo.train translate`: {steps:,} optimizer steps of 128 samples, AdamW with a cosine schedule,
float32, seed {seed}; {minutes:.1f} minutes on two shared CPU cores.

## Held-out accuracy

Exact match of greedy translations of {held_out} items whose sources no training sample contains, in any spelling or
language. Weights rounded to float16, computed in float32, language given as the decoder prompt:

{table}

With the language named by the prefix "to German: " instead:

{by_prefix}

## Limits

It knows only the words of its corpus: any other word, and any sentence of another shape, gives a wrong or
meaningless translation, without warning. It is a demonstration, not a translator for real use.

## Licence

Apache-2.0.
"""

_CHAT = """---
license: apache-2.0
language: [en]
pipeline_tag: text-generation
---

# trivium-chat

A Llama of {parameters:,} parameters (width 192, four layers, six heads over two key-value heads, tied embeddings,
byte-level BPE of 640 tokens with every digit apart, weights in float16) that holds short factual dialogues over a
closed world. It ships with the Trivium server so that its first answer needs no network.

## Use

The tokenizer's chat template renders the roles system, user and assistant; the answer ends with `<|end|>`.

## Data

Written by `trivium.demo.dialogue_corpus`; nothing was collected. Dialogues of one to twelve questions, a third of
them with a system message, about:

- sums and differences of numbers from 0 to 99, products up to 12 x 12, comparison, parity, doubles and halves;
- weekdays (before, after, N days later up to 31), months (length, order, number);
- units of time, length, weight, volume and money, and dozens;
- greetings, what the model is, the user's name, and questions out of scope, which it declines;
- follow-ups: "And 5 plus 6?", "Add 3 to that.", "And June?", "What is my name?".

## Training

`python -m trivium.demo.train chat`: {steps:,} optimizer steps of about 3,072 tokens, AdamW with a cosine schedule,
float32, seed {seed}; {minutes:.1f} minutes on two shared CPU cores. Only what the assistant says is learnt.

## Held-out accuracy

Exact match of greedy answers to {held_out} dialogues whose last question is held out. Sums and differences beyond 12,
comparisons, days more than a week later and decimal units are held out as such, whatever their wording; facts that can
only be looked up (sums up to 12, products, months, sixties) are held out in the wording that is asked. Weights
rounded to float16, computed in float32:

{table}

## Limits

It computes only within the ranges above and knows no other fact; the system message does not change what it says;
dialogues much longer than 300 tokens are outside of its training. It is a demonstration, not an assistant.

## Licence

Apache-2.0.
"""


def write_translate(directory: Path, facts: Facts) -> None:
    """Write the translator's card."""
    text = _TRANSLATE.format(
        parameters=facts.parameters,
        nouns=len(NOUNS),
        steps=facts.steps,
        seed=facts.seed,
        minutes=facts.minutes,
        held_out=translation_corpus.HELD_OUT_SIZE,
        table=table(facts.scores),
        by_prefix=table(facts.by_prefix) if facts.by_prefix else "not measured",
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def write_chat(directory: Path, facts: Facts) -> None:
    """Write the dialogue model's card."""
    text = _CHAT.format(
        parameters=facts.parameters,
        steps=facts.steps,
        seed=facts.seed,
        minutes=facts.minutes,
        held_out=dialogue_corpus.HELD_OUT_SIZE,
        table=table(facts.scores),
    )
    (directory / "README.md").write_text(text, encoding="utf-8")
