"""copy_blocks, block by block."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import DTYPES, randn
from trivium_kernels.dispatch import Kernels


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_a_pool(kernels: Kernels, dtype: torch.dtype) -> None:
    pool = randn(8, 3, 2, 5, 2, 80, dtype=dtype)
    expected = pool.clone()
    expected[[4, 0, 7]] = pool[[1, 1, 2]]
    kernels.copy_blocks(pool, pool, torch.tensor([1, -1, 1, 2]), torch.tensor([4, -1, 0, 7]))
    assert torch.equal(pool, expected)


def test_out_of_a_pool_and_back(kernels: Kernels) -> None:
    pool, gathered = randn(6, 2, 3, 7), torch.zeros(2, 2, 3, 7)
    blocks, places = torch.tensor([5, 2]), torch.tensor([0, 1])
    kernels.copy_blocks(pool, gathered, blocks, places)
    assert torch.equal(gathered, pool[[5, 2]])
    empty = torch.zeros_like(pool)
    kernels.copy_blocks(gathered, empty, places, blocks)
    assert torch.equal(empty[[5, 2]], pool[[5, 2]])
    assert not empty[[0, 1, 3, 4]].any()


def test_no_blocks(kernels: Kernels) -> None:
    pool, none = randn(2, 3), torch.tensor([], dtype=torch.int64)
    kernels.copy_blocks(pool, pool, none, none)
    assert torch.equal(pool, randn(2, 3))
