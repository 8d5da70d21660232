"""Encoders over packs of sequences, with T5's biases and without."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_kernels.case import Case, Inputs, num_bytes
from trivium_kernels.dispatch import Kernels

SCALE = 0.125


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    for count, length, heads in ((16, 512, (12, 64)), (4, 1024, (16, 64))) if full else ((2, 20, (2, 16)),):
        for has_bias in (False, True):
            yield _case(kernels, inputs, count, length, heads, has_bias=has_bias)


def _case(kernels: Kernels, inputs: Inputs, count: int, length: int, heads: tuple[int, int], *, has_bias: bool) -> Case:
    query, key, value = (inputs.normal(count * length, *heads) for _ in range(3))
    bias_table = inputs.normal(heads[0], 257, dtype=torch.float32) if has_bias else None
    bounds = torch.arange(count + 1) * length
    plan = kernels.plan_varlen_attention(bounds, causal=False, bias_table=bias_table, device=inputs.device)
    return Case(
        f"{count} x {length}, {heads[0]} x {heads[1]}{', bias' if has_bias else ''}",
        lambda: kernels.varlen_attention(query, key, value, plan, scale=SCALE),
        lambda: _by_torch(query.double(), key.double(), value.double(), length, bias_table),
        4 * num_bytes(query),
        lambda: _by_torch(query, key, value, length, bias_table),
        num_flops=4 * count * length * length * heads[0] * heads[1],
    )


def _by_torch(query: Tensor, key: Tensor, value: Tensor, length: int, bias_table: Tensor | None) -> Tensor:
    mask = None
    if bias_table is not None:
        places = torch.arange(length, device=query.device)
        distance = (places - places[:, None]).clamp(-128, 128) + 128
        mask = bias_table[:, distance].to(query.dtype)
    parts = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=SCALE).transpose(1, 2).flatten(0, 1)
