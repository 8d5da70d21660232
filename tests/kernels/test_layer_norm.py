"""layer_norm and add_layer_norm against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_checks import DTYPES, assert_near, randn
from trivium_kernels.dispatch import Kernels


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x.double() - x.double().mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight.double() + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 3, 80), (2, 1500), (3, 1024), (0, 8)])
def test_layer_norm(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype) + 3
    weight, bias = randn(shape[-1], seed=1, dtype=dtype), randn(shape[-1], seed=2, dtype=dtype)
    y = kernels.layer_norm(x, weight, bias, 1e-3)
    assert y.dtype == dtype
    assert_near(y, norm(x, weight, bias, 1e-3))


def test_heads_within_a_wider_projection(kernels: Kernels) -> None:
    qkv, weight, bias = randn(4, 9, 96), randn(96, seed=1), randn(96, seed=2)
    assert_near(kernels.layer_norm(qkv[:, 2:5], weight, bias, 1e-6), norm(qkv[:, 2:5], weight, bias, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 1024])
def test_add_layer_norm_norms_what_it_leaves_in_the_residual(kernels: Kernels, width: int, dtype: torch.dtype) -> None:
    update, residual = randn(5, width, dtype=dtype), randn(5, width, seed=1, dtype=dtype)
    weight, bias, before = randn(width, seed=2).to(dtype), randn(width, seed=3).to(dtype), residual.clone()
    y = kernels.add_layer_norm(update, residual, weight, bias, 1e-3)
    assert_near(residual, before.double() + update.double())
    assert_near(y, norm(residual, weight, bias, 1e-3))


def test_a_row_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    x, weight, bias = randn(9, 96), randn(96, seed=1), randn(96, seed=2)
    together = kernels.layer_norm(x, weight, bias, 1e-6)
    assert all(torch.equal(kernels.layer_norm(x[i : i + 1], weight, bias, 1e-6)[0], together[i]) for i in range(9))
