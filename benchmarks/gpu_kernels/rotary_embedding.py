"""Rotation of queries and keys of a decode step and of a prompt."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_kernels.case import Case, Inputs, num_bytes
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    for num_tokens, num_heads, head_dim in ((64, 40, 128), (4096, 40, 128)) if full else ((3, 5, 16),):
        yield _case(kernels, inputs, num_tokens, num_heads, head_dim)


def _case(kernels: Kernels, inputs: Inputs, num_tokens: int, num_heads: int, head_dim: int) -> Case:
    x = inputs.normal(num_tokens, num_heads, head_dim)
    cos, sin = (inputs.normal(num_tokens, 1, head_dim, dtype=torch.float32) for _ in range(2))
    return Case(
        f"{num_tokens} x {num_heads} x {head_dim}",
        lambda: kernels.rotary_embedding(x, cos, sin),
        lambda: reference.rotary_embedding(x.double(), cos.double(), sin.double()),
        2 * num_bytes(x),
        lambda: reference.rotary_embedding(x, cos, sin),
    )
