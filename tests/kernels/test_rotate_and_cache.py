"""rotate_and_cache against the formulas of the ops that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_checks import DTYPES, assert_near, randn
from trivium_kernels.dispatch import Kernels
from trivium_kernels.rotate_and_cache import HeadNorms

BLOCK_SIZE = 3
SLOTS = [11, 0, -1, 3, 8]


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    half = angles.shape[1]
    first, second, rest = x.double().split((half, half, x.shape[-1] - 2 * half), -1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"), [(4, 2, 64, 64), (10, 1, 80, 32), (3, 3, 6, 6)]
)
def test_queries_are_returned_and_keys_and_values_written(
    kernels: Kernels,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    has_norms: bool,
    dtype: torch.dtype,
) -> None:
    qkv = randn(len(SLOTS), num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    angles = randn(len(SLOTS), rotary_dim // 2, seed=3)
    cos = torch.cat((angles.cos(), angles.cos()), -1)[:, None]
    sin = torch.cat((-angles.sin(), angles.sin()), -1)[:, None]
    norms = (
        HeadNorms(randn(head_dim, seed=4, dtype=dtype), randn(head_dim, seed=5, dtype=dtype), 1e-3)
        if has_norms
        else None
    )
    pool = torch.full((4, 3, 2, BLOCK_SIZE, num_kv_heads, head_dim), -7.0, dtype=dtype)

    query = kernels.rotate_and_cache(qkv, (cos, sin), pool[:, 1, 0], pool[:, 1, 1], torch.tensor(SLOTS), norms)

    queries, keys, values = qkv.split((num_heads, num_kv_heads, num_kv_heads), 1)
    if norms is not None:
        queries, keys = normed(queries, norms.query, norms.eps), normed(keys, norms.key, norms.eps)
    factor = 3.0 if has_norms else 1.0  # plain torch rounds between the steps, too
    assert query.dtype == dtype
    assert_near(query, rotated(queries, angles), factor=factor)
    rotated_keys = rotated(keys, angles)
    untouched = torch.ones_like(pool, dtype=torch.bool)
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            place = slot // BLOCK_SIZE, 1, slice(None), slot % BLOCK_SIZE
            assert_near(pool[place][0], rotated_keys[token], factor=factor)
            assert torch.equal(pool[place][1], values[token])
            untouched[place] = False
    assert (pool[untouched] == -7.0).all()
