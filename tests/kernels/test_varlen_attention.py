"""varlen_attention against the formula in float64, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import DTYPES, assert_near, attention, bounds, randn, skip_plain_torch
from trivium_kernels.dispatch import Kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "causal", "has_bias"),
    [
        (1, 1, 7, False, False),
        (4, 4, 64, False, True),
        (6, 2, 80, True, False),
        (7, 1, 96, False, False),
        (3, 3, 128, True, True),
    ],
)
def test_varlen_attention(
    kernels: Kernels,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    causal: bool,
    has_bias: bool,
    dtype: torch.dtype,
) -> None:
    lens = [5, 1, 0, 70, 33]
    query = randn(sum(lens), num_heads, head_dim, dtype=dtype)
    key = randn(sum(lens), num_kv_heads, head_dim, seed=1, dtype=dtype)
    value = randn(sum(lens), num_kv_heads, head_dim, seed=2, dtype=dtype)
    bias_table = randn(num_heads, 41, dtype=dtype) if has_bias else None
    plan = kernels.plan_varlen_attention(bounds(lens), causal=causal, bias_table=bias_table)
    output = kernels.varlen_attention(query, key, value, plan, scale=0.2)
    expected = [
        attention(q, k, v, 0.2, causal=causal, bias_table=bias_table)
        for q, k, v in zip(query.split(lens), key.split(lens), value.split(lens), strict=True)
    ]
    assert output.dtype == dtype
    assert_near(output, torch.cat(expected), factor=2.0)


def test_slices_of_a_merged_projection(kernels: Kernels) -> None:
    qkv = randn(20, 3, 4, 16)
    query, key, value = qkv.unbind(1)
    output = kernels.varlen_attention(
        query, key, value, kernels.plan_varlen_attention(bounds([20]), causal=False), scale=0.5
    )
    assert_near(output, attention(query, key, value, 0.5, causal=False))


def test_a_sequence_does_not_depend_on_the_pack(kernels: Kernels) -> None:
    skip_plain_torch(kernels)
    query, key, value = (randn(30, 2, 16, seed=seed) for seed in range(3))
    together = kernels.varlen_attention(
        query, key, value, kernels.plan_varlen_attention(bounds([11, 19]), causal=False), scale=0.5
    )
    alone = kernels.varlen_attention(
        query[11:], key[11:], value[11:], kernels.plan_varlen_attention(bounds([19]), causal=False), scale=0.5
    )
    assert torch.equal(together[11:], alone)


def test_an_empty_pack(kernels: Kernels) -> None:
    plan = kernels.plan_varlen_attention(torch.tensor([0]), causal=False)
    nothing = randn(0, 2, 16)
    assert kernels.varlen_attention(nothing, nothing, nothing, plan, scale=1.0).shape == (0, 2, 16)
