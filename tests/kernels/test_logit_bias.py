"""add_logit_bias, pair by pair."""

from __future__ import annotations

import torch

from kernel_checks import randn
from trivium_kernels.dispatch import Kernels


def test_it_adds_to_the_named_logits_alone(kernels: Kernels) -> None:
    logits = randn(4, 50)
    rows = torch.tensor([0, 3, -1, 3, 1, 2] + [0] * 40)
    token_ids = torch.tensor([49, 0, 5, 7, 50, 99, *range(40)])  # 50 and 99 are not in the vocabulary
    biases = randn(len(rows), seed=1)
    expected = logits.clone()
    for row, token, bias in zip(rows.tolist(), token_ids.tolist(), biases, strict=True):
        if row >= 0 and token < 50:
            expected[row, token] += bias
    kernels.add_logit_bias(logits, rows, token_ids, biases)
    assert torch.equal(logits, expected)


def test_no_biases(kernels: Kernels) -> None:
    logits, none = randn(2, 5), torch.tensor([], dtype=torch.int64)
    kernels.add_logit_bias(logits, none, none, torch.tensor([]))
    assert torch.equal(logits, randn(2, 5))
