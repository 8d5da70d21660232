"""reshape_and_cache, slot by slot."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import DTYPES, randn
from trivium_kernels.dispatch import Kernels

BLOCK_SIZE = 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [5, 80, 600])
def test_it_writes_the_slots_and_nothing_else(kernels: Kernels, head_dim: int, dtype: torch.dtype) -> None:
    pool = torch.zeros(4, 3, 2, BLOCK_SIZE, 2, head_dim, dtype=dtype)
    key = randn(6, 7, head_dim, dtype=dtype)[:, 2:4]  # a slice of a wider projection
    value = randn(6, 2, head_dim, seed=1, dtype=dtype)
    slots = torch.tensor([11, 0, 4, 3, 8, 7])
    kernels.reshape_and_cache(key, value, pool[:, 1, 0], pool[:, 1, 1], slots)
    expected = torch.zeros_like(pool)
    for row, slot in enumerate(slots.tolist()):
        expected[slot // BLOCK_SIZE, 1, 0, slot % BLOCK_SIZE] = key[row]
        expected[slot // BLOCK_SIZE, 1, 1, slot % BLOCK_SIZE] = value[row]
    assert torch.equal(pool, expected)


def test_no_tokens(kernels: Kernels) -> None:
    pool = torch.zeros(4, 1, 2, BLOCK_SIZE, 2, 5)
    nothing = randn(0, 2, 5)
    kernels.reshape_and_cache(nothing, nothing, pool[:, 0, 0], pool[:, 0, 1], torch.tensor([], dtype=torch.int64))
    assert not pool.any()
