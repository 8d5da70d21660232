"""What int8 changes in the bundled models' answers: python benchmarks/quantization.py

Every token of held-out dialogues and translations is scored twice, in float32 and in int8, after the same tokens.
Prints how often both think the same token most likely, and the mean Kullback-Leibler divergence in nats.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from trivium.config import ExecutorConfig
from trivium.demo import dialogue_corpus, translation_corpus
from trivium.demo.checkpoints import LANGUAGE_TOKENS, bundled_path
from trivium.executor.model_runner import ModelRunner
from trivium.params import SamplingParams
from trivium.step import CachedRequestData, NewRequestData, SchedulerOutput

NUM_TEXTS = 60

Text = tuple[tuple[int, ...], tuple[int, ...]]  # encoder input (empty without an encoder), the tokens that are scored


class Scorer:
    """Logits of every token of a text, in one step."""

    def __init__(self, task: str, quantization: str | None) -> None:
        self._runner = ModelRunner(
            ExecutorConfig(model=str(bundled_path(task)), served_model_name=task, quantization=quantization)
        )
        self._rows: list[Tensor] = []
        decoder = self._runner._model.decoder
        forward = decoder.forward

        def keep(*args: object) -> Tensor:
            hidden: Tensor = forward(*args)  # type: ignore[arg-type]
            self._rows.append(decoder.compute_logits(hidden))
            return hidden

        decoder.forward = keep  # type: ignore[method-assign]

    def log_probs(self, text: Text) -> Tensor:
        """[num_tokens, vocab_size] for what follows each token."""
        encoder, tokens = text
        self._runner.reset()
        block_size = self._runner.model_info.block_size
        num_blocks, num_cross = (-(-len(ids) // block_size) for ids in (tokens, encoder))
        new = NewRequestData(
            slot=0,
            prompt_token_ids=tokens,
            output_token_ids=(),
            num_computed_tokens=0,
            block_ids=tuple(range(num_blocks)),
            sampling=SamplingParams(temperature=0, max_tokens=1),
            choice_index=0,
            max_tokens=1,
            encoder_token_ids=encoder,
            cross_block_ids=tuple(range(num_blocks, num_blocks + num_cross)),
        )
        plan = SchedulerOutput(
            step=1,
            scheduled_slots=(0,),
            num_scheduled_tokens=(len(tokens),),
            new_requests=(new,),
            new_blocks=CachedRequestData((), ()),
            encoder_slots=(0,) if encoder else (),
            freed_slots=(),
        )
        self._rows.clear()
        self._runner.execute(plan)
        return torch.log_softmax(self._rows[0], dim=-1)


def texts_of(task: str) -> list[Text]:
    tokenizer = Tokenizer.from_file(str(bundled_path(task) / "tokenizer.json"))
    if task == "chat":
        plain = [f"{item.messages[-1]['content']}\n{item.answer}" for item in dialogue_corpus.held_out()[:NUM_TEXTS]]
        return [((), tuple(tokenizer.encode(text).ids)) for text in plain]
    texts = []
    for item in translation_corpus.held_out()[:NUM_TEXTS]:
        language = tokenizer.token_to_id(LANGUAGE_TOKENS[item.language])
        target = tokenizer.encode(item.target, add_special_tokens=False).ids
        texts.append((tuple(tokenizer.encode(item.source).ids), (0, language, *target)))
    return texts


def measure(task: str, texts: Sequence[Text]) -> str:
    exact, rounded = Scorer(task, None), Scorer(task, "int8")
    num_tokens, agreements, divergence = 0, 0, 0.0
    for text in texts:
        p, q = exact.log_probs(text), rounded.log_probs(text)
        num_tokens += len(p)
        agreements += int((p.argmax(-1) == q.argmax(-1)).sum())
        divergence += float((p.exp() * (p - q)).sum())
    return f"| trivium-{task} | {num_tokens} | {agreements / num_tokens:.2%} | {divergence / num_tokens:.5f} |"


def main() -> None:
    logging.disable(logging.WARNING)
    print("| int8 against float32 | tokens | same most likely token | divergence, nats |\n|---|---|---|---|")
    for task in ("chat", "translate"):
        print(measure(task, texts_of(task)), flush=True)


if __name__ == "__main__":
    main()
