"""`paged_attention` and `varlen_attention` in C++: one loop over keys where they lie, nothing is gathered or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trivium_kernels.cpu import _native
from trivium_kernels.cpu.addresses import bits, heads_of
from trivium_kernels.paged_attention import PagedAttentionPlan
from trivium_kernels.varlen_attention import VarlenAttentionPlan

Segment = tuple[int, int, int, int]  # tokens [begin, end), their row of the block tables, number of keys


@dataclass(frozen=True, slots=True)
class _Masks:
    """What a query sees. segments: [num_segments, 4] int64, a Segment each. bias_table: as the plan was given it."""

    segments: Tensor
    causal: bool
    window: int
    bias_table: Tensor | None

    @classmethod
    def of(cls, segments: Sequence[Segment], *, causal: bool, window: int | None, bias_table: Tensor | None) -> _Masks:
        table = None if bias_table is None else bias_table.float().contiguous()
        return cls(torch.tensor(segments, dtype=torch.int64).view(-1, 4), causal, window or 0, table)


@dataclass(frozen=True, slots=True)
class NativePagedPlan(PagedAttentionPlan):
    masks: _Masks
    block_tables: Tensor  # [num_rows, max_blocks] int32
    block_size: int


@dataclass(frozen=True, slots=True)
class NativeVarlenPlan(VarlenAttentionPlan):
    masks: _Masks


def plan_paged_attention(
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    block_size: int,
    causal: bool,
    window: int | None = None,
    bias_table: Tensor | None = None,
) -> NativePagedPlan:
    contexts, bounds = context_lens.tolist(), cu_seqlens_q.tolist()
    tables = block_tables.to(torch.int32).contiguous()
    segments = [(bounds[row], bounds[row + 1], row, context) for row, context in enumerate(contexts)]
    if not causal and bias_table is None:
        segments = _merge_rows_with_same_keys(segments, tables, block_size)
    masks = _Masks.of(segments, causal=causal, window=window, bias_table=bias_table)
    return NativePagedPlan(masks, tables, block_size)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: PagedAttentionPlan,
    *,
    scale: float,
    soft_cap: float | None = None,
) -> Tensor:
    assert isinstance(plan, NativePagedPlan), "the plan is of another device"
    return _attend(query, key_cache, value_cache, plan.masks, scale, soft_cap, plan)


def plan_varlen_attention(
    cu_seqlens: Tensor, *, causal: bool, bias_table: Tensor | None = None, device: torch.device | None = None
) -> NativeVarlenPlan:
    segments = [(start, end, 0, end - start) for start, end in pairwise(cu_seqlens.tolist())]
    return NativeVarlenPlan(_Masks.of(segments, causal=causal, window=None, bias_table=bias_table))


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, plan: VarlenAttentionPlan, *, scale: float) -> Tensor:
    assert isinstance(plan, NativeVarlenPlan), "the plan is of another device"
    key, value = heads_of(key), heads_of(value)
    if key.stride(0) != value.stride(0):
        key, value = key.contiguous(), value.contiguous()
    return _attend(query, key, value, plan.masks, scale, None, None)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    masks: _Masks,
    scale: float,
    soft_cap: float | None,
    paged: NativePagedPlan | None,
) -> Tensor:
    """keys, values: caches [num_blocks, block_size, num_kv_heads, head_dim] if `paged`, else packed tokens."""
    if query.dtype is not torch.float32:
        attended = _attend(query.float(), keys.float(), values.float(), masks, scale, soft_cap, paged)
        return attended.to(query.dtype)
    query = heads_of(query)
    num_tokens, num_heads, head_dim = query.shape
    output = torch.empty((num_tokens, num_heads, head_dim))
    table, bias = None if paged is None else paged.block_tables, masks.bias_table
    _native.attend(
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        0 if table is None else table.data_ptr(),
        masks.segments.data_ptr(),
        masks.segments.shape[0],
        num_heads,
        keys.shape[-2],
        head_dim,
        query.stride(0),
        keys.stride(-3),
        0 if table is None else table.stride(0),
        1 if paged is None else paged.block_size,
        0 if paged is None else keys.stride(0),
        masks.window,
        0 if bias is None else bias.shape[1] // 2,
        bits(scale),
        bits(soft_cap or 0.0),
        masks.causal,
    )
    return output


def _merge_rows_with_same_keys(segments: Sequence[Segment], tables: Tensor, block_size: int) -> list[Segment]:
    """Neighbours with the same blocks, as beams have for cross-attention, as one segment: their keys are read once."""
    rows = tables.tolist()
    merged: list[Segment] = []
    for begin, end, row, context in segments:
        used = -(-context // block_size)
        if merged:
            first, _, other, other_context = merged[-1]
            if context == other_context and rows[row][:used] == rows[other][:used]:
                merged[-1] = (first, end, other, context)
                continue
        merged.append((begin, end, row, context))
    return merged
