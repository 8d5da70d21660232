"""add_lora against products of one row at a time."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import randn
from trivium_kernels.add_lora import LoraExpand, LoraWeights
from trivium_kernels.dispatch import Kernels


@pytest.mark.parametrize("groups", [((0, 3, 4), (2,)), (None,), ((5,), (0, 1, 2, 3, 4)), ()])
def test_add_lora(kernels: Kernels, groups: tuple[tuple[int, ...] | None, ...]) -> None:
    y, x = randn(6, 11), randn(6, 5)
    weights = [
        LoraWeights(randn(5, 5), (LoraExpand(0, 0, randn(4, 3)), LoraExpand(7, 3, randn(3, 2)))),
        LoraWeights(randn(1, 5, seed=1), (LoraExpand(4, 0, randn(7, 1)),)),
    ][: len(groups)]
    expected = y.clone()
    for rows, adapter in zip(groups, weights, strict=True):
        for row in range(6) if rows is None else rows:
            for part in adapter.expand:
                width, rank = part.matrix.shape
                shrunk = adapter.shrink[part.first_rank : part.first_rank + rank] @ x[row]
                expected[row, part.start : part.start + width] += part.matrix @ shrunk
    indexed = [None if rows is None else torch.tensor(rows) for rows in groups]
    kernels.add_lora(y, x, list(zip(indexed, weights, strict=True)))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
