"""Decode steps, prompts in chunks, windows, T5's biases, cross-attention of beams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_kernels.case import Case, Inputs
from trivium_kernels.dispatch import Kernels

BLOCK_SIZE = 16
CHECKED_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """num_rows rows with `queries` queries and `context` keys each; `sharing` rows on end have the same keys."""

    num_rows: int
    context: int
    queries: int = 1
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    causal: bool = True
    window: int | None = None
    has_bias: bool = False
    soft_cap: float | None = None
    sharing: int = 1

    def __str__(self) -> str:
        extras = [
            f"window {self.window}" if self.window else "",
            "bias" if self.has_bias else "",
            f"cap {self.soft_cap}" if self.soft_cap else "",
            "" if self.causal else "cross",
            f"{self.sharing} beams" if self.sharing > 1 else "",
        ]
        heads = f"{self.num_heads}/{self.num_kv_heads} x {self.head_dim}"
        return ", ".join(filter(None, (f"{self.num_rows} x {self.queries} of {self.context}", heads, *extras)))


FULL = (
    Shape(num_rows=1, context=1024),
    Shape(num_rows=1, context=32768),
    Shape(num_rows=64, context=1024),
    Shape(num_rows=64, context=8192),
    Shape(num_rows=256, context=1024),
    Shape(num_rows=64, context=4096, num_heads=32, num_kv_heads=32),
    Shape(num_rows=64, context=4096, num_heads=16, head_dim=256, window=1024, soft_cap=50.0),
    Shape(num_rows=64, context=512, num_heads=12, num_kv_heads=12, head_dim=64, has_bias=True),
    Shape(num_rows=64, context=1024, num_heads=16, num_kv_heads=16, head_dim=64, causal=False),
    Shape(num_rows=64, context=1024, num_heads=16, num_kv_heads=16, head_dim=64, causal=False, sharing=4),
    Shape(num_rows=2, context=2048, queries=2048),
    Shape(num_rows=2, context=8192, queries=512),
    Shape(num_rows=8, context=512, queries=64, num_heads=12, num_kv_heads=12, head_dim=64, has_bias=True),
)
SMALL = (
    Shape(num_rows=3, context=40, num_heads=4, num_kv_heads=2, head_dim=16),
    Shape(num_rows=2, context=300, num_heads=2, num_kv_heads=1, head_dim=16, window=270, soft_cap=5.0),
    Shape(num_rows=4, context=20, num_heads=2, num_kv_heads=2, head_dim=16, causal=False, sharing=2),
    Shape(num_rows=2, context=30, queries=9, num_heads=2, num_kv_heads=2, head_dim=16, has_bias=True),
)


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    for shape in FULL if full else SMALL:
        yield _case(kernels, inputs, shape)


def _case(kernels: Kernels, inputs: Inputs, shape: Shape) -> Case:
    num_blocks = -(-shape.context // BLOCK_SIZE)
    num_tables = shape.num_rows // shape.sharing
    pool = inputs.normal(num_tables * num_blocks, 1, 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    tables = inputs.different(num_tables * num_blocks, num_tables * num_blocks).view(num_tables, num_blocks).int()
    tables = tables.repeat_interleave(shape.sharing, dim=0)
    query = inputs.normal(shape.num_rows * shape.queries, shape.num_heads, shape.head_dim)
    context_lens = torch.full((shape.num_rows,), shape.context, dtype=torch.int32, device=inputs.device)
    bias_table = inputs.normal(shape.num_heads, 257, dtype=torch.float32) if shape.has_bias else None
    plan = kernels.plan_paged_attention(
        tables,
        context_lens,
        torch.arange(shape.num_rows + 1) * shape.queries,
        block_size=BLOCK_SIZE,
        causal=shape.causal,
        window=shape.window,
        bias_table=bias_table,
    )
    scale = shape.head_dim**-0.5
    key_cache, value_cache = pool[:, 0, 0], pool[:, 0, 1]
    checked = slice(0, CHECKED_ROWS * shape.queries)

    def run() -> Tensor:
        output = kernels.paged_attention(query, key_cache, value_cache, plan, scale=scale, soft_cap=shape.soft_cap)
        return output[checked]

    def expected() -> Tensor:
        rows = range(min(CHECKED_ROWS, shape.num_rows))
        keys, values = (
            [c[tables[row]].flatten(0, 1)[: shape.context] for row in rows] for c in (key_cache, value_cache)
        )
        parts = zip(query[checked].split(shape.queries), keys, values, strict=True)
        return torch.cat([_exact(q, k, v, shape, bias_table) for q, k, v in parts])

    seen = min(shape.context, (shape.window or shape.context) + shape.queries)
    kv_bytes = num_tables * seen * 2 * shape.num_kv_heads * shape.head_dim * pool.element_size()
    pairs = shape.num_rows * shape.queries * (seen - shape.queries / 2 if shape.causal else seen)
    return Case(
        str(shape),
        run,
        expected,
        kv_bytes + 2 * query.nbytes,
        _peer(query, key_cache, value_cache, tables, shape) if not shape.has_bias and not shape.soft_cap else None,
        num_flops=int(4 * pairs * shape.num_heads * shape.head_dim),
    )


def _exact(query: Tensor, key: Tensor, value: Tensor, shape: Shape, bias_table: Tensor | None) -> Tensor:
    """One row in float64."""
    group = shape.num_heads // shape.num_kv_heads
    keys, values = (part.double().repeat_interleave(group, 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * shape.head_dim**-0.5
    if shape.soft_cap is not None:
        scores = shape.soft_cap * (scores / shape.soft_cap).tanh()
    positions = torch.arange(len(key) - len(query), len(key), device=key.device)
    distance = torch.arange(len(key), device=key.device) - positions[:, None]
    if bias_table is not None:
        limit = bias_table.shape[1] // 2
        scores = scores + bias_table.double()[:, distance.clamp(-limit, limit) + limit]
    if shape.causal:
        scores = scores.masked_fill(distance > 0, -torch.inf)
    if shape.window is not None:
        scores = scores.masked_fill(distance <= -shape.window, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def _peer(query: Tensor, key_cache: Tensor, value_cache: Tensor, tables: Tensor, shape: Shape) -> Any:
    """Gathering keys and values, then torch's attention; windows are left out."""

    def run() -> Tensor:
        keys, values = (
            cache[tables.flatten()].view(shape.num_rows, -1, *cache.shape[2:])[:, : shape.context].transpose(1, 2)
            for cache in (key_cache, value_cache)
        )
        queries = query.view(shape.num_rows, shape.queries, shape.num_heads, shape.head_dim).transpose(1, 2)
        is_causal = shape.causal and shape.queries == shape.context
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal, enable_gqa=True)

    return run
