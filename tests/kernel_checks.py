"""What the tests of the kernels have in common: inputs, and how near a result must be."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels

TRITON = os.environ.get("TRITON_INTERPRET") == "1"  # whether it is Triton that is tested (`kernels/conftest.py`)
only_triton = pytest.mark.skipif(not TRITON, reason="plain torch does not promise this")


def skip_plain_torch(kernels: Kernels) -> None:
    """Of what the other implementations promise."""
    if kernels.paged_attention is reference.paged_attention:
        pytest.skip("plain torch does not promise this")


# As shares of the largest number of a result. bfloat16 has 8 bits, and Triton's interpreter cuts off what it should
# round; a sum over more than a few numbers needs the rest.
_TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = (torch.float32, torch.bfloat16)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def bounds(lens: list[int]) -> Tensor:
    """[len(lens) + 1] running sums that start with 0."""
    return torch.tensor([0, *lens]).cumsum(0)


def assert_near(found: Tensor, expected: Tensor, *, factor: float = 1.0) -> None:
    """`found` is `expected`, float64 of the same inputs, but for the rounding of its type. No number may be missing."""
    assert found.shape == expected.shape
    assert not found.isnan().any(), f"{int(found.isnan().sum())} of {found.numel()} numbers were never written"
    if not found.numel():
        return
    expected = expected.double()
    error = (found.double() - expected).abs()
    allowed = factor * _TOLERANCES[found.dtype]
    worst = float((error / (expected.abs() + expected.abs().max() / 4 + 1e-30)).max())
    assert worst <= allowed, f"off by {worst:.1e} of the largest number, {allowed:.1e} are allowed"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    causal: bool,
    window: int | None = None,
    bias_table: Tensor | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Attention of one sequence in float64 [queries, num_heads, head_dim]; the last query stands at the last key.

    query [queries, num_heads, head_dim]; key, value [keys, num_kv_heads, head_dim]. By the formula of
    `trivium_kernels.paged_attention`.
    """
    group = query.shape[1] // key.shape[1]
    keys, values = (part.double().repeat_interleave(group, 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    positions = torch.arange(len(key) - len(query), len(key))
    distance = torch.arange(len(key)) - positions[:, None]
    if bias_table is not None:
        limit = bias_table.shape[1] // 2
        scores = scores + bias_table.double()[:, distance.clamp(-limit, limit) + limit]
    if causal:
        scores = scores.masked_fill(distance > 0, -torch.inf)
    if window is not None:
        scores = scores.masked_fill(distance <= -window, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
