"""`paged_attention` and `varlen_attention` in C++: one loop over keys where they lie, nothing is gathered or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from trivium_kernels.cpu import _native
from trivium_kernels.cpu.addresses import bits, heads_of
from trivium_kernels.cpu.memory import empty
from trivium_kernels.cpu.recording import updated_in_replays
from trivium_kernels.paged_attention import PagedAttentionPlan
from trivium_kernels.varlen_attention import VarlenAttentionPlan

Segment = tuple[int, int, int, int]  # tokens [begin, end), their row of the block tables, number of keys


@dataclass(frozen=True, slots=True)
class _Masks:
    """What a query sees. rows: where the segments are. bias_table: as the plan was given it."""

    rows: _Rows
    causal: bool
    window: int
    bias_table: Tensor | None

    @classmethod
    def of(cls, rows: _Rows, *, causal: bool, window: int | None, bias_table: Tensor | None) -> _Masks:
        return cls(rows, causal, window or 0, None if bias_table is None else bias_table.float().contiguous())


class _Rows:
    """The segments of a step, behind an address that stays when a recording is told of other ones.

    find: their segments, and the block tables [num_rows, max_blocks] of these if they have some.
    """

    __slots__ = ("_find", "_segments", "_tables", "_words")

    def __init__(self, find: Callable[[], tuple[Sequence[Segment], Tensor | None]]) -> None:
        self._find = find
        self._words = torch.zeros(4, dtype=torch.int64)  # the addresses and sizes that the module reads
        self.update()

    @property
    def address(self) -> int:
        return self._words.data_ptr()

    def update(self) -> None:
        segments, tables = self._find()
        self._segments = np.array(segments, np.int64).reshape(-1, 4)
        self._tables = None if tables is None else tables.to(torch.int32).contiguous()
        words = self._words.numpy()
        words[:2] = self._segments.ctypes.data, len(self._segments)
        if self._tables is not None:
            words[2:] = self._tables.data_ptr(), self._tables.stride(0)


@dataclass(frozen=True, slots=True)
class NativePagedPlan(PagedAttentionPlan):
    masks: _Masks
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
    may_merge = not causal and bias_table is None

    def find() -> tuple[Sequence[Segment], Tensor]:
        contexts, bounds = context_lens.tolist(), cu_seqlens_q.tolist()
        segments = [(bounds[row], bounds[row + 1], row, context) for row, context in enumerate(contexts)]
        if may_merge:
            segments = _merge_rows_with_same_keys(segments, block_tables, block_size)
        return segments, block_tables

    rows = updated_in_replays(lambda: _Rows(find))
    return NativePagedPlan(_Masks.of(rows, causal=causal, window=window, bias_table=bias_table), block_size)


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
    rows = updated_in_replays(lambda: _Rows(lambda: (segments, None)))
    return NativeVarlenPlan(_Masks.of(rows, causal=causal, window=None, bias_table=bias_table))


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
    output = empty((num_tokens, num_heads, head_dim))
    bias = masks.bias_table
    _native.attend(
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        masks.rows.address,
        num_heads,
        keys.shape[-2],
        head_dim,
        query.stride(0),
        keys.stride(-3),
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
    used_most = max((-(-context // block_size) for *_, context in segments), default=0)
    rows = tables[:, :used_most].tolist()
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
