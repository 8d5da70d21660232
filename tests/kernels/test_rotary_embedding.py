"""rotary_embedding against a product of complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_checks import DTYPES, assert_near, randn
from trivium_kernels.dispatch import Kernels


def rotation(num_tokens: int, rotary_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(cos, signed sin) as the op takes them, and the angles [num_tokens, rotary_dim // 2]."""
    angles = randn(num_tokens, rotary_dim // 2, seed=7)
    cos = torch.cat((angles.cos(), angles.cos()), -1)[:, None]
    return cos, torch.cat((-angles.sin(), angles.sin()), -1)[:, None], angles


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of the two halves of the first elements of a head are complex numbers."""
    half = angles.shape[1]
    turned = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    turned = turned * torch.polar(torch.ones_like(angles.double()), angles.double())[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :].double()), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "head_dim", "rotary_dim"), [(3, 8, 8), (11, 80, 32), (1, 96, 96), (9, 64, 24)])
def test_rotary_embedding(kernels: Kernels, num_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    x = randn(5, num_heads, head_dim, dtype=dtype)
    cos, sin, angles = rotation(5, rotary_dim)
    y = kernels.rotary_embedding(x, cos, sin)
    assert y.dtype == dtype
    assert_near(y, rotate(x, angles))
    assert torch.equal(y[..., rotary_dim:], x[..., rotary_dim:])


def test_heads_within_a_wider_projection(kernels: Kernels) -> None:
    qkv = randn(4, 9, 64)
    cos, sin, angles = rotation(4, 64)
    assert_near(kernels.rotary_embedding(qkv[:, :6], cos, sin), rotate(qkv[:, :6], angles))


def test_no_tokens(kernels: Kernels) -> None:
    cos, sin, _ = rotation(0, 8)
    assert kernels.rotary_embedding(randn(0, 3, 8), cos, sin).shape == (0, 3, 8)
