"""Rotation and cache write of the merged projection, in a decode step and for a prompt, with and without norms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_kernels.case import Case, Inputs, num_bytes
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels
from trivium_kernels.rotate_and_cache import HeadNorms


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    for num_tokens, heads, head_dim in ((64, (32, 8), 128), (4096, (32, 8), 128)) if full else ((3, (4, 2), 16),):
        for has_norms in (False, True):
            yield _case(kernels, inputs, num_tokens, heads, head_dim, has_norms=has_norms)


def _case(
    kernels: Kernels, inputs: Inputs, num_tokens: int, heads: tuple[int, int], head_dim: int, *, has_norms: bool
) -> Case:
    num_heads, num_kv_heads = heads
    qkv = inputs.normal(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    cos, sin = (inputs.normal(num_tokens, 1, head_dim, dtype=torch.float32) for _ in range(2))
    pool = inputs.normal(max(2, num_tokens // 8), 2, 2, 16, num_kv_heads, head_dim)
    slots = inputs.different(num_tokens, 16 * len(pool))
    norms = HeadNorms(inputs.normal(head_dim), inputs.normal(head_dim), 1e-6) if has_norms else None

    def expected() -> Tensor:
        wanted = pool.double()
        exact = None if norms is None else HeadNorms(norms.query.double(), norms.key.double(), norms.eps)
        rotation = cos.double(), sin.double()
        return reference.rotate_and_cache(qkv.double(), rotation, wanted[:, 1, 0], wanted[:, 1, 1], slots, exact)

    return Case(
        f"{num_tokens} tokens, {num_heads}/{num_kv_heads} x {head_dim}{', normed' if has_norms else ''}",
        lambda: kernels.rotate_and_cache(qkv, (cos, sin), pool[:, 1, 0], pool[:, 1, 1], slots, norms),
        expected,
        2 * num_bytes(qkv),
        lambda: reference.rotate_and_cache(qkv, (cos, sin), pool[:, 1, 0], pool[:, 1, 1], slots, norms),
    )
