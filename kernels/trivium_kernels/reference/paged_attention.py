"""`paged_attention` in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium_kernels.paged_attention import PagedAttentionPlan
from trivium_kernels.reference.attention import attend, bias_at, mask_of_reversed_queries

# A batch of single queries is padded to its longest context; it is split where that would waste more than this share.
_MAX_PADDING = 0.25
# ... but never into batches with fewer keys than this: a call costs as much as copying about 2000 of them.
_MIN_BATCH_KEYS = 2048


@dataclass(frozen=True, slots=True)
class SingleQueryBatch:
    """Rows [start, end) with one query each, which are also the tokens [start, end): one batched attention.

    Each `num_sharing` rows on end read the same keys, which are read once: they are one of the
    num_groups = (end - start) // num_sharing. blocks: [num_groups * blocks_per_group]. mask: additive
    [num_groups, num_heads or 1, 1, keys of blocks_per_group], or None.
    """

    start: int
    end: int
    blocks: Tensor
    mask: Tensor | None
    num_sharing: int = 1


@dataclass(frozen=True, slots=True)
class QuerySegment:
    """One row with tokens [start, end).

    mask: additive [num_heads or 1, end - start, context_len], last query first, or None.
    is_causal: a plain causal mask over equally many queries and keys applies.
    """

    start: int
    end: int
    blocks: Tensor
    context_len: int
    is_causal: bool
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class TorchPagedPlan(PagedAttentionPlan):
    batches: tuple[SingleQueryBatch, ...]
    segments: tuple[QuerySegment, ...]


def plan_paged_attention(
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    block_size: int,
    causal: bool,
    window: int | None = None,
    bias_table: Tensor | None = None,
) -> TorchPagedPlan:
    contexts, bounds = context_lens.tolist(), cu_seqlens_q.tolist()
    num_single = 0
    while num_single < len(contexts) and bounds[num_single + 1] == num_single + 1:
        num_single += 1
    batches = []
    can_share = not causal and bias_table is None
    sharing = _rows_that_share(block_tables, contexts[:num_single], block_size) if can_share else [(num_single, 1)]
    first = 0
    for num_groups, width in sharing:
        lens = contexts[first : first + num_groups * width : width]
        for low, high in _batches_of_similar_length(lens):
            start, end = first + low * width, first + high * width
            num_blocks = -(-max(lens[low:high]) // block_size)
            mask = _single_query_mask(context_lens[start:end:width], num_blocks * block_size, window, bias_table)
            blocks = block_tables[start:end:width, :num_blocks].reshape(-1)
            batches.append(SingleQueryBatch(start, end, blocks, mask, width))
        first += num_groups * width
    segments = []
    for row in range(num_single, len(contexts)):
        start, end, context = bounds[row], bounds[row + 1], contexts[row]
        if start == end:
            continue
        blocks = block_tables[row, : -(-context // block_size)]
        masked = bias_table is not None or (causal and (context > end - start > 1 or (window or context) < context))
        mask = None
        if masked:
            mask = mask_of_reversed_queries(end - start, context, causal=causal, window=window, bias_table=bias_table)
        is_causal = causal and not masked and end - start > 1
        segments.append(QuerySegment(start, end, blocks, context, is_causal, mask))
    return TorchPagedPlan(tuple(batches), tuple(segments))


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: PagedAttentionPlan,
    *,
    scale: float,
    soft_cap: float | None = None,
) -> Tensor:
    assert isinstance(plan, TorchPagedPlan), "the plan is of another device"
    num_kv_heads, head_dim = key_cache.shape[2:]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)  # [num_tokens, num_heads, head_dim]
    for batch in plan.batches:
        width = batch.num_sharing
        num_groups = (batch.end - batch.start) // width
        # The rows and heads that share a key head are its queries: each key is read once, and no key is repeated.
        heads_per_key = query.shape[1] // num_kv_heads
        shape = (num_groups, width, num_kv_heads, heads_per_key, head_dim)
        keys = key_cache.index_select(0, batch.blocks).view(num_groups, -1, num_kv_heads, head_dim)
        values = value_cache.index_select(0, batch.blocks).view(num_groups, -1, num_kv_heads, head_dim)
        mask = batch.mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask.view(num_groups, num_kv_heads, heads_per_key, -1)
        queries = query[batch.start : batch.end].reshape(shape).transpose(1, 2).flatten(2, 3)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if soft_cap is None:
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        else:
            attended = _capped_attention(queries, keys, values, mask, scale, soft_cap)
        # attended: [num_groups, num_kv_heads, width * heads_per_key, head_dim]
        target = output[batch.start : batch.end].view(shape).transpose(1, 2)
        target.copy_(attended.view(num_groups, num_kv_heads, width, heads_per_key, head_dim))
    for segment in plan.segments:
        rows = slice(segment.start, segment.end)
        keys = key_cache.index_select(0, segment.blocks).view(-1, num_kv_heads, head_dim)[: segment.context_len]
        values = value_cache.index_select(0, segment.blocks).view(-1, num_kv_heads, head_dim)[: segment.context_len]
        if soft_cap is None:
            output[rows] = attend(query[rows], keys, values, segment.mask, segment.is_causal, scale)
        else:
            output[rows] = _attend_capped(query[rows], keys, values, segment, scale, soft_cap)
    return output


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, segment: QuerySegment, scale: float, soft_cap: float
) -> Tensor:
    """As `attend`, with capped scores."""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    mask = segment.mask
    if segment.is_causal:
        mask = mask_of_reversed_queries(num_queries, len(key), causal=True, window=None, bias_table=None)
    if mask is not None:
        mask = mask.view(num_kv_heads, -1, *mask.shape[1:]) if len(mask) > 1 else mask.unsqueeze(0)
    shape = (num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    queries = query.flip(0).view(shape).permute(1, 2, 0, 3)  # [num_kv_heads, heads of one, queries, head_dim]
    attended = _capped_attention(
        queries, key.transpose(0, 1).unsqueeze(1), value.transpose(0, 1).unsqueeze(1), mask, scale, soft_cap
    )
    return attended.flatten(0, 1).transpose(0, 1).flip(0)


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, soft_cap: float
) -> Tensor:
    """query [..., queries, head_dim], key and value [..., keys, head_dim], mask broadcast to [..., queries, keys]."""
    scores = (query @ key.transpose(-1, -2)).mul_(scale / soft_cap).tanh_().mul_(soft_cap)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1) @ value


def _single_query_mask(
    context_lens: Tensor, num_keys: int, window: int | None, bias_table: Tensor | None
) -> Tensor | None:
    """[num_rows, num_heads or 1, 1, num_keys], or None where every row sees all `num_keys` keys."""
    distance = torch.arange(num_keys, device=context_lens.device) - (context_lens[:, None] - 1)  # [num_rows, num_keys]
    hidden = distance > 0
    if window is not None:
        hidden |= distance <= -window
    if bias_table is None and not bool(hidden.any()):
        return None
    bias = bias_at(bias_table, distance).transpose(0, 1)  # [num_rows, num_heads or 1, num_keys]
    return bias.masked_fill(hidden[:, None], -torch.inf).unsqueeze(2)


def _rows_that_share(block_tables: Tensor, contexts: Sequence[int], block_size: int) -> list[tuple[int, int]]:
    """(number of groups, rows of each group) in the order of the rows: rows of a group have the same keys."""
    if not contexts:
        return []
    tables = block_tables[: len(contexts)].tolist()
    keys = [(length, table[: -(-length // block_size)]) for length, table in zip(contexts, tables, strict=True)]
    widths = [sum(1 for _ in rows) for _, rows in groupby(keys)]
    return [(sum(1 for _ in groups), width) for width, groups in groupby(widths)]


def _batches_of_similar_length(contexts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Half-open row ranges that cover `contexts` in order and waste little when each is padded to its longest."""
    start, used, longest = 0, 0, 0
    for row, context in enumerate(contexts):
        longest = max(longest, context)
        wasted = longest * (row + 1 - start) - used - context
        if wasted > _MAX_PADDING * (used + context) and used >= _MIN_BATCH_KEYS:
            yield start, row
            start, used, longest = row, 0, context
        used += context
    if contexts:
        yield start, len(contexts)
