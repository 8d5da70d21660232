"""Sampling: reproducible in any company, distributed as asked, and bound by what the model and the request forbid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trivium.executor.input_batch import BatchLimits, InputBatch
from trivium.executor.model_config import SpecialTokens
from trivium.executor.sampler import Sampler, uniform_numbers
from trivium.params import SamplingParams
from trivium.step import NewRequestData, SchedulerOutput

VOCAB_SIZE = 1000
EOS = 7
PLAIN = SpecialTokens(eos=(EOS,), bos=None, pad=None, decoder_start=None, forced_bos=None, forced_eos=None)
LIMITS = BatchLimits(
    max_num_seqs=64,
    max_num_batched_tokens=64,
    max_model_len=64,
    max_encoder_len=0,
    num_blocks=64,
    block_size=4,
    vocab_size=VOCAB_SIZE,
)


def make_row(slot: int, *, output: int = 0, prompt: int = 3, choice_index: int = 0, **params: Any) -> NewRequestData:
    sampling = SamplingParams(**{"max_tokens": 40, "seed": 1, **params})
    return NewRequestData(slot, (1,) * prompt, (1,) * output, 0, (), sampling, choice_index, sampling.max_tokens or 1)


def sample(logits: Tensor, *rows: NewRequestData, special: SpecialTokens = PLAIN) -> list[int]:
    """One token per row; `logits` is [num_rows, vocab_size], or [vocab_size] for all rows."""
    batch = InputBatch(LIMITS)
    batch.apply(SchedulerOutput(0, new_requests=rows))
    slots = np.array([row.slot for row in rows])
    return Sampler(special).sample(logits.expand(len(rows), -1).clone(), batch, slots).tolist()


def random_logits(num_rows: int, seed: int = 0) -> Tensor:
    return 2.0 * torch.randn((num_rows, VOCAB_SIZE), generator=torch.Generator().manual_seed(seed))


def draws(logits: Tensor, count: int, **params: Any) -> list[int]:
    """`count` tokens of one request each with its own seed."""
    tokens = []
    for start in range(0, count, 64):
        tokens += sample(logits, *(make_row(slot, seed=start + slot, **params) for slot in range(64)))
    return tokens[:count]


_MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 1.0, "top_k": 600, "top_p": 0.99},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "typical_p": 0.5},
    {"temperature": 1.0, "top_a": 0.5, "top_k": 30},
    {"temperature": 1.0, "epsilon_cutoff": 20, "eta_cutoff": 40},
    {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.01, "top_p": 0.9},
    {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.001},
    {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.01, "min_p": 0.01},
    {"temperature": 0.0, "repetition_penalty": 2.0, "no_repeat_ngram_size": 1},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 1.0, "logit_bias": {5: 8.0}},
    {"temperature": 1.0, "bad_words": ("x",), "bad_words_token_ids": ((1, 5), (6,))},
    {"temperature": 1.0, "allowed_token_ids": (4, 5, 6), "min_p": 0.1},
    {"temperature": 1.0, "dry_multiplier": 2.0, "dry_allowed_length": 1},
    {"temperature": 0.8, "min_tokens": 40},
]


def test_a_row_gets_the_same_token_alone_and_in_a_mixed_batch() -> None:
    logits = random_logits(len(_MIXED))
    rows = [make_row(slot, output=slot, **params) for slot, params in enumerate(_MIXED)]
    together = sample(logits, *rows)
    alone = [sample(logits[slot], replace(row, slot=9))[0] for slot, row in enumerate(rows)]
    assert together == alone


def test_a_row_gets_the_same_token_with_its_output_resumed_as_output() -> None:
    """Fresh rows that came to a length and rows that arrive with that output are the same rows."""
    logits = random_logits(len(_MIXED), seed=5)
    batch, slots = InputBatch(LIMITS), np.arange(len(_MIXED))
    rows = [make_row(slot, **params) for slot, params in enumerate(_MIXED)]
    batch.apply(SchedulerOutput(0, new_requests=tuple(rows)))
    for _ in range(4):
        counts = batch.num_tokens[slots] - batch.num_computed_tokens[slots]
        scheduled = batch.schedule_rows(SchedulerOutput(1, tuple(slots.tolist()), tuple(counts.tolist())))
        batch.advance(scheduled)
        batch.append_tokens(scheduled.slots, np.ones(len(slots), np.int64))
    continued = Sampler(PLAIN).sample(logits.clone(), batch, slots).tolist()
    assert continued == sample(logits, *(make_row(slot, output=4, **params) for slot, params in enumerate(_MIXED)))


def test_random_numbers_depend_on_seed_choice_and_position_only() -> None:
    keys = [(seed, choice, position) for seed in (-1, 0, 1) for choice in (0, 1) for position in range(4)]
    seeds, choices, positions = (np.array(column, np.int64) for column in zip(*keys, strict=True))
    numbers = uniform_numbers(seeds, choices, positions)
    assert len(set(numbers.tolist())) == len(keys)
    for index in range(len(keys)):
        one = slice(index, index + 1)
        assert uniform_numbers(seeds[one], choices[one], positions[one])[0] == numbers[index]


def test_random_numbers_are_uniform() -> None:
    numbers = uniform_numbers(np.full(20000, 5), np.zeros(20000, np.int64), np.arange(20000))
    assert numbers.min() > 0.0 and numbers.max() < 1.0
    histogram = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((histogram - 1000) ** 2 / 1000).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.75},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 1.0, "top_k": 4, "top_p": 0.8},
    ],
)
def test_tokens_are_distributed_as_asked(params: dict[str, Any]) -> None:
    probs = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = torch.full((VOCAB_SIZE,), -torch.inf)
    logits[:5] = probs.log()
    expected = probs ** (1 / params["temperature"])
    expected /= expected.sum()
    expected[expected < params.get("min_p", 0.0) * expected.max()] = 0.0
    order = expected.argsort(descending=True)
    expected[order[params.get("top_k", 5) :]] = 0.0
    expected /= expected.sum()
    before = expected[order].cumsum(0) - expected[order]
    expected[order[before >= params.get("top_p", 1.1)]] = 0.0
    expected /= expected.sum()
    count = 3200
    seen = torch.bincount(torch.tensor(draws(logits, count, **params)), minlength=5) / count
    assert seen[5:].sum() == 0
    assert (seen[:5][expected == 0] == 0).all()
    torch.testing.assert_close(seen[:5], expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("top_p", [0.3, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    logits = random_logits(1)[0]  # top_p 0.999 needs more than the shortlist
    probs, order = logits.softmax(0).sort(descending=True)
    num_kept = int((probs.cumsum(0) - probs < top_p).sum())
    allowed = set(order[:num_kept].tolist())
    assert (num_kept > 256) == (top_p == 0.999)
    assert set(draws(logits, 640, temperature=1.0, top_p=top_p)) <= allowed


def test_greedy_takes_the_largest() -> None:
    logits = random_logits(3)
    rows = [make_row(slot, temperature=0.0) for slot in range(3)]
    assert sample(logits, *rows) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("output", "is_banned"), [(0, True), (1, True), (2, False)])
def test_min_tokens_bans_eos_and_stop_tokens(temperature: float, output: int, is_banned: bool) -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[[EOS, 9]], logits[11] = 50.0, 40.0
    row = make_row(0, output=output, temperature=temperature, min_tokens=2, stop_token_ids=(9,))
    assert (sample(logits, row) == [11]) == is_banned


def test_forced_tokens_replace_what_was_sampled() -> None:
    special = replace(PLAIN, forced_bos=5, forced_eos=6)
    rows = [
        make_row(0, prompt=1, temperature=0.0),
        make_row(1, prompt=2, temperature=0.0),
        make_row(2, output=39, temperature=0.0),
        make_row(3, output=39, temperature=0.0, ignore_eos=True),
        make_row(4, output=38, temperature=1.0),
    ]
    logits = torch.zeros(VOCAB_SIZE)
    logits[20] = 90.0
    assert sample(logits, *rows, special=special) == [5, 20, 6, 20, 20]


def test_choices_of_one_request_differ() -> None:
    tokens = sample(random_logits(1)[0], *(make_row(slot, choice_index=slot, temperature=1.0) for slot in range(16)))
    assert len(set(tokens)) > 8
