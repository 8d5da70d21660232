"""count_tokens and apply_penalties against Counters and the formula, one token at a time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kernel_checks import assert_near, randn
from trivium_kernels.dispatch import Kernels
from trivium_kernels.penalties import Penalties, TokenCounts


def no_counts(num_slots: int, vocab_size: int) -> TokenCounts:
    return TokenCounts(
        torch.zeros((num_slots, -(-vocab_size // 32)), dtype=torch.int32),
        torch.zeros((num_slots, vocab_size), dtype=torch.int32),
    )


@pytest.mark.parametrize("vocab_size", [1, 33, 1100])
def test_rows_with_prompts_and_outputs(kernels: Kernels, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = no_counts(6, vocab_size)
    prompts, outputs = ([Counter(), Counter(), Counter(), Counter(), Counter(), Counter()] for _ in range(2))
    for histories, of_output in ((prompts, False), (outputs, True), (outputs, True)):
        slots = torch.randint(-1, 6, (200,), generator=generator)
        token_ids = torch.randint(-1, vocab_size + 5, (200,), generator=generator)
        kernels.count_tokens(counts, slots, token_ids, of_output=of_output)
        for slot, token in zip(slots.tolist(), token_ids.tolist(), strict=True):
            if slot >= 0 and 0 <= token < vocab_size:
                histories[slot][token] += 1

    repetition = torch.tensor([1.3, 1.0, 1.0, 0.7])
    frequency = torch.tensor([0.5, 0.0, 0.0, -0.25])
    presence = torch.tensor([0.125, 0.0, 1.5, 0.0])
    logits, slots = randn(4, vocab_size), [5, 0, 2, 1]
    expected = logits.double()
    for row, slot in enumerate(slots):
        for token in prompts[slot] | outputs[slot]:
            value = expected[row, token]
            value = value * repetition[row].double() if value < 0 else value / repetition[row].double()
            value = value - outputs[slot][token] * frequency[row].double()
            expected[row, token] = value - (presence[row].double() if token in outputs[slot] else 0)
    neutral = logits[1].clone()
    kernels.apply_penalties(logits, counts, torch.tensor(slots), Penalties(repetition, frequency, presence))
    assert_near(logits, expected)
    assert torch.equal(logits[1], neutral)


def test_a_banned_token_stays_banned(kernels: Kernels) -> None:
    counts = no_counts(1, 4)
    kernels.count_tokens(counts, torch.tensor([0]), torch.tensor([2]), of_output=True)
    logits = torch.tensor([[1.0, 1.0, -torch.inf, 1.0]])
    one = torch.ones(1)
    kernels.apply_penalties(logits, counts, torch.tensor([0]), Penalties(1.5 * one, one, one))
    assert logits.tolist() == [[1.0, 1.0, -torch.inf, 1.0]]
