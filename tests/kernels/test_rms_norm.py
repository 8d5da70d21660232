"""rms_norm and add_rms_norm against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_checks import DTYPES, assert_near, randn
from trivium_kernels.dispatch import Kernels


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 3, 80), (2, 1500), (3, 1024), (0, 8)])
def test_rms_norm(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], seed=1, dtype=dtype)
    y = kernels.rms_norm(x, weight, 1e-3)
    assert y.dtype == dtype
    assert_near(y, norm(x, weight, 1e-3))


def test_heads_within_a_wider_projection(kernels: Kernels) -> None:
    qkv, weight = randn(4, 9, 96), randn(96, seed=1)
    assert_near(kernels.rms_norm(qkv[:, 2:5], weight, 1e-6), norm(qkv[:, 2:5], weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 1024])
def test_add_rms_norm_norms_what_it_leaves_in_the_residual(kernels: Kernels, width: int, dtype: torch.dtype) -> None:
    update, residual = randn(5, width, dtype=dtype), randn(5, width, seed=1, dtype=dtype)
    weight, before = randn(width, seed=2), residual.clone()
    y = kernels.add_rms_norm(update, residual, weight.to(dtype), 1e-3)
    assert_near(residual, before.double() + update.double())
    assert_near(y, norm(residual, weight.to(dtype), 1e-3))


def test_a_row_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    x, weight = randn(9, 96), randn(96, seed=1)
    together = kernels.rms_norm(x, weight, 1e-6)
    assert all(torch.equal(kernels.rms_norm(x[i : i + 1], weight, 1e-6)[0], together[i]) for i in range(9))
