"""The dialogue corpus: seeded generators of short factual dialogues, single turns and follow-ups.

Which side of the split a turn falls on depends on a stable hash of its key. Where an answer can be computed (sums and
differences beyond twelve, comparisons, more than a week later, decimal units) the key is the meaning, so no wording of
a held-out question is ever trained on. Where it can only be looked up (sums up to twelve, products, months, sixties
and the like) the key is the question as it is worded: the fact is trained on, that wording of it is not. Small talk is
always trained on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from trivium.demo import dialogue_lexicon as words
from trivium.demo.dialogue_turns import draw

HELD_OUT_SIZE = 500

_HELD_OUT_PER_MILLE = 60


@dataclass(frozen=True)
class DialogueItem:
    """A dialogue that ends with a user's turn, and the assistant's answer to it."""

    messages: list[dict[str, str]]
    answer: str
    category: str
    key: str


def is_held_out(key: str) -> bool:
    """Whether a turn belongs to the held-out set, stable across runs, machines and versions."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 1000 < _HELD_OUT_PER_MILLE


def _respell(rng: random.Random, question: str) -> str:
    """A careless or a polite spelling of the same question."""
    roll = rng.random()
    if roll < 0.06:
        return question.lower()
    if roll < 0.12:
        return question.rstrip("?. =")
    if roll < 0.15:
        return question.lower().rstrip("?. =")
    if roll < 0.19 and question.endswith("?"):
        return rng.choice(("Hello! ", "Hi, ", "Please tell me: ", "Hello, ")) + question
    return question


def _length(rng: random.Random) -> int:
    """How many turns a dialogue has; a few are long, so that far positions are trained too."""
    return rng.choices((1, rng.randint(2, 3), rng.randint(4, 12)), (62, 28, 10))[0]


def _dialogue(rng: random.Random, last_held_out: bool) -> DialogueItem | None:
    """A dialogue whose turns are all trainable but the last, which is on the wanted side of the split."""
    messages: list[dict[str, str]] = []
    if rng.random() < 0.35:
        messages.append({"role": "system", "content": rng.choice(words.SYSTEM_MESSAGES)})
    topic, name = ("", 0), None
    length = _length(rng)
    for index in range(length):
        wanted = last_held_out and index == length - 1
        for _ in range(400):
            turn = draw(rng, topic, name, fresh=index == 0)
            if (not turn.core and is_held_out(turn.key)) == wanted:
                break
        else:
            return None
        messages.append({"role": "user", "content": _respell(rng, turn.question)})
        if index == length - 1:
            return DialogueItem(messages, turn.answer, turn.category, turn.key)
        messages.append({"role": "assistant", "content": turn.answer})
        topic = turn.topic
        name = words.NAMES[topic[1]] if topic[0] == "name" else name
    return None


def train_stream(seed: int = 0) -> Iterator[DialogueItem]:
    """An endless, reproducible stream of training dialogues; every assistant turn in them may be learnt."""
    rng = random.Random(seed)
    while True:
        item = _dialogue(rng, last_held_out=False)
        if item is not None:
            yield item


def held_out(size: int = HELD_OUT_SIZE, seed: int = 20240303) -> list[DialogueItem]:
    """The held-out dialogues: the last question is held out, the turns before it are not."""
    rng = random.Random(seed)
    items: dict[str, DialogueItem] = {}
    while len(items) < size:
        item = _dialogue(rng, last_held_out=True)
        if item is not None:
            items.setdefault(repr(item.messages), item)
    return list(items.values())
