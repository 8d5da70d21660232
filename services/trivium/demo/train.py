"""Training of the two bundled models on the corpora they are generated with.

    python -m trivium.demo.train translate|chat [--minutes M] [--steps N] [--out DIR] [--seed N] [--threads N]

A run is seeded and takes a fixed number of optimizer steps, so that it can be repeated; `--minutes` bounds it by the
clock instead, for a quick look. The checkpoint, its tokenizer and a model card with the measured held-out accuracy
are written to the output directory. On a machine that is busy with other work, OMP_WAIT_POLICY=passive in the
environment keeps the threads from spinning while they wait for each other.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trivium.demo import card, checkpoints, dialogue_corpus, evaluate, translation_corpus

_IGNORED = -100
_WARMUP = 0.05
_POOL = 32
_PREFIXED_SHARE = 0.25

Batch = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; a batch is bounded by its samples and, padding included, by its tokens."""

    steps: int
    batch: int
    tokens: int
    rate: float
    decay: float


RECIPES: dict[str, Recipe] = {
    "translate": Recipe(steps=4000, batch=128, tokens=16384, rate=3e-3, decay=0.01),
    "chat": Recipe(steps=3600, batch=128, tokens=3072, rate=3e-3, decay=0.1),
}


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _bucketed(
    samples: Iterator[T], recipe: Recipe, length: Callable[[T], int], rng: random.Random
) -> Iterator[list[T]]:
    """Batches of samples of like length, in random order, so that little of a batch is padding."""
    while True:
        batches: list[list[T]] = [[]]
        for sample in sorted(islice(samples, recipe.batch * _POOL), key=length):
            full = len(batches[-1]) == recipe.batch or (len(batches[-1]) + 1) * length(sample) > recipe.tokens
            if full and batches[-1]:
                batches.append([])
            batches[-1].append(sample)
        rng.shuffle(batches)
        yield from batches


@dataclass(frozen=True)
class _Pair:
    source: list[int]
    decoder: list[int]
    labels: list[int]


def _translation_pairs(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[_Pair]:
    rng = random.Random(seed)
    # The bare tokenizer: for texts this short, most of the time would go into the wrapper around it.
    encode = tokenizer.backend_tokenizer.encode
    start, end = checkpoints.token_ids(tokenizer, [checkpoints.PAD, checkpoints.EOS])
    tokens = checkpoints.LANGUAGE_TOKENS
    languages = dict(zip(tokens, checkpoints.token_ids(tokenizer, list(tokens.values())), strict=True))
    for item in translation_corpus.train_stream(seed):
        prefixed = rng.random() < _PREFIXED_SHARE
        source = translation_corpus.with_prefix(item, int(rng.random() < 0.3)) if prefixed else item.source
        language = languages[item.language]
        text = encode(item.target, add_special_tokens=False).ids
        # Without a prefix nothing in the source tells the language, so only the default one is taught.
        told = prefixed or item.language == "fr"
        labels = [language if told else _IGNORED, *text, end]
        yield _Pair(encode(source).ids, [start, language, *text], labels)


def translation_batches(tokenizer: PreTrainedTokenizerFast, seed: int, recipe: Recipe) -> Iterator[Batch]:
    """Endless batches for the translator."""
    pairs = _translation_pairs(tokenizer, seed)
    for rows in _bucketed(pairs, recipe, lambda pair: len(pair.source) + len(pair.decoder), random.Random(seed)):
        source = _pad([row.source for row in rows], tokenizer.pad_token_id)
        yield {
            "input_ids": source,
            "attention_mask": (source != tokenizer.pad_token_id).long(),
            "decoder_input_ids": _pad([row.decoder for row in rows], tokenizer.pad_token_id),
            "labels": _pad([row.labels for row in rows], _IGNORED),
        }


def dialogue_batches(tokenizer: PreTrainedTokenizerFast, seed: int, recipe: Recipe) -> Iterator[Batch]:
    """Endless batches for the dialogue model; only what the assistant says is learnt."""
    rows = (dialogue_row(tokenizer, item.messages, item.answer) for item in dialogue_corpus.train_stream(seed))
    for chosen in _bucketed(rows, recipe, lambda row: len(row[0]), random.Random(seed)):
        tokens = _pad([row[0] for row in chosen], tokenizer.pad_token_id)
        yield {
            "input_ids": tokens,
            "attention_mask": (tokens != tokenizer.pad_token_id).long(),
            "labels": _pad([row[1] for row in chosen], _IGNORED),
        }


def dialogue_row(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], answer: str
) -> tuple[list[int], list[int]]:
    """The tokens of a dialogue as the chat template renders it, and its labels."""
    tokens: list[int] = []
    labels: list[int] = []
    (end,) = checkpoints.token_ids(tokenizer, [checkpoints.CHAT_END])
    for message in [*messages, {"role": "assistant", "content": answer}]:
        (role,) = checkpoints.token_ids(tokenizer, [f"<|{message['role']}|>"])
        text = [*tokenizer.backend_tokenizer.encode(message["content"], add_special_tokens=False).ids, end]
        tokens += [role, *text]
        labels += [_IGNORED, *(text if message["role"] == "assistant" else [_IGNORED] * len(text))]
    return tokens, labels


def _rate(progress: float) -> float:
    """A short linear warmup, then a cosine down to zero."""
    if progress < _WARMUP:
        return progress / _WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))


def fit(model: PreTrainedModel, batches: Iterator[Batch], recipe: Recipe, minutes: float | None) -> tuple[int, float]:
    """Train for the recipe's steps, or for `minutes` of the clock; the steps and the minutes it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=recipe.decay)
    started = time.monotonic()
    average, done = 0.0, 0
    bar = tqdm(total=None if minutes else recipe.steps, mininterval=5)
    model.train()
    for step, batch in enumerate(batches):
        elapsed = time.monotonic() - started
        progress = elapsed / (60 * minutes) if minutes else step / recipe.steps
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _rate(progress)
        loss = model(**batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        bar.update()
        done = step + 1
    bar.close()
    return done, (time.monotonic() - started) / 60


def train_translate(out: Path, recipe: Recipe, seed: int, minutes: float | None) -> None:
    """Train, save, measure and describe the translator."""
    sample = list(islice(translation_corpus.train_stream(seed), 30_000))
    texts = [text for item in sample for text in (item.source, item.target)]
    texts += [translation_corpus.with_prefix(item, index % 2) for index, item in enumerate(sample[:3_000])]
    tokenizer = checkpoints.translate_tokenizer(texts)
    model = checkpoints.translate_model(tokenizer)
    steps, took = fit(model, translation_batches(tokenizer, seed, recipe), recipe, minutes)
    checkpoints.save(model, tokenizer, out)
    scores, misses = evaluate.evaluate_translate(out)
    by_prefix, _ = evaluate.evaluate_translate(out, by_prefix=True)
    card.write_translate(out, card.Facts(model.num_parameters(), steps, seed, took, scores, by_prefix))
    _report(scores, misses, took)
    print(evaluate.table(by_prefix))


def train_chat(out: Path, recipe: Recipe, seed: int, minutes: float | None) -> None:
    """Train, save, measure and describe the dialogue model."""
    sample = list(islice(dialogue_corpus.train_stream(seed), 10_000))
    texts = [text for item in sample for text in (*(turn["content"] for turn in item.messages), item.answer)]
    tokenizer = checkpoints.chat_tokenizer(texts)
    model = checkpoints.chat_model(tokenizer)
    steps, took = fit(model, dialogue_batches(tokenizer, seed, recipe), recipe, minutes)
    checkpoints.save(model, tokenizer, out)
    scores, misses = evaluate.evaluate_chat(out)
    card.write_chat(out, card.Facts(model.num_parameters(), steps, seed, took, scores))
    _report(scores, misses, took)


def _report(scores: evaluate.Scores, misses: list[tuple[str, str, str]], minutes: float) -> None:
    print(f"trained in {minutes:.1f} minutes")
    print(evaluate.table(scores))
    for question, expected, output in misses[:40]:
        print(f"  {question!r}: expected {expected!r}, got {output!r}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("translate", "chat"))
    parser.add_argument("--minutes", type=float, help="train for this long instead of a fixed number of steps")
    parser.add_argument("--steps", type=int, help="train for this many steps instead of the recipe's")
    parser.add_argument("--out", type=Path, help="output directory (the bundled checkpoint by default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    recipe = RECIPES[arguments.task]
    if arguments.steps:
        recipe = replace(recipe, steps=arguments.steps)
    out: Path = arguments.out or checkpoints.bundled_path(arguments.task)
    run = train_translate if arguments.task == "translate" else train_chat
    run(out, recipe, arguments.seed, arguments.minutes)


if __name__ == "__main__":
    main()
