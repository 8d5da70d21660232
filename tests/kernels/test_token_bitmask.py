"""apply_token_bitmask, bit by bit."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import randn
from trivium_kernels.dispatch import Kernels


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100, 2100])
def test_it_keeps_the_tokens_whose_bit_is_set(kernels: Kernels, vocab_size: int) -> None:
    logits = randn(5, vocab_size)
    rows = torch.tensor([3, 0, 4])
    allowed = randn(3, vocab_size, seed=1) > 0
    words = [[0] * -(-vocab_size // 32) for _ in rows]
    for row, token in allowed.nonzero().tolist():
        words[row][token // 32] |= 1 << token % 32
    signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in words]
    expected = logits.clone()
    for row, mask in zip(rows.tolist(), allowed, strict=True):
        expected[row, ~mask] = -torch.inf
    kernels.apply_token_bitmask(logits, torch.tensor(signed, dtype=torch.int32), rows)
    assert torch.equal(logits, expected)


def test_masks_and_logits_may_be_columns_of_wider_ones(kernels: Kernels) -> None:
    wide = randn(4, 300)
    logits, expected = wide[:, 10:270], wide.clone()
    words = torch.zeros(2, 12, dtype=torch.int32)
    words[0, 2:] = torch.tensor([-1, 0, -(2**31), 2**31 - 1, -1, -1, 0, 1, -1, 0], dtype=torch.int32)
    is_allowed = (words[:, 2:11, None] >> torch.arange(32) & 1).bool().flatten(1)[:, :260]
    rows = torch.tensor([2, 1])
    expected[rows, 10:270] = expected[rows, 10:270].masked_fill(~is_allowed, -torch.inf)
    kernels.apply_token_bitmask(logits, words[:, 2:], rows)
    assert torch.equal(wide, expected)
