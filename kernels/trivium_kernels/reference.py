"""Every op in plain torch: the CPU path, and the definition that other implementations are tested against.

Contracts are in the op files. Nothing here keeps state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium_kernels.activation import Activation
from trivium_kernels.add_lora import LoraWeights
from trivium_kernels.paged_attention import PagedAttentionPlan, QuerySegment, SingleQueryBatch
from trivium_kernels.varlen_attention import VarlenAttentionPlan, VarlenSequence

# A batch of single queries is padded to its longest context; it is split where that would waste more than this share.
_MAX_PADDING = 0.25
# ... but never into batches with fewer keys than this: a call costs as much as copying about 2000 of them.
_MIN_BATCH_KEYS = 2048


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_lora(y: Tensor, x: Tensor, groups: Sequence[tuple[Tensor | None, LoraWeights]]) -> None:
    for rows, weights in groups:
        shrunk = F.linear(x if rows is None else x[rows], weights.shrink)
        for part in weights.expand:
            width, rank = part.matrix.shape
            target, source = y.narrow(1, part.start, width), shrunk.narrow(1, part.first_rank, rank)
            if rows is None:
                target.addmm_(source, part.matrix.T)
            else:
                target.index_add_(0, rows, F.linear(source, part.matrix))


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat((rotary_embedding(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(rotary_dim // 2, dims=-1), sin)


def activate(x: Tensor, kind: Activation) -> Tensor:
    match kind:
        case Activation.RELU:
            return x.relu_()
        case Activation.SILU:
            return F.silu(x, inplace=True)
        case Activation.GELU:
            return F.gelu(x)
        case Activation.GELU_TANH:
            return F.gelu(x, approximate="tanh")
        case Activation.QUICK_GELU:
            return x.mul_(torch.sigmoid(1.702 * x))
        case Activation.RELU2:
            return x.relu_().square_()
        case Activation.RELU6:
            return x.clamp_(0, 6)
        case Activation.LEAKY_RELU:
            return F.leaky_relu(x, inplace=True)
        case Activation.HARDSWISH:
            return F.hardswish(x, inplace=True)
        case Activation.MISH:
            return F.mish(x, inplace=True)
        case Activation.TANH:
            return x.tanh_()
        case Activation.SIGMOID:
            return x.sigmoid_()
        case Activation.LINEAR:
            return x


def gated_activate(gate_up: Tensor, kind: Activation) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, kind).mul_(up)


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    block_size = key_cache.shape[1]
    row_width = key_cache.shape[2] * key_cache.shape[3]
    # Seen as rows of one token each, a block starts every `rows_per_block` rows; rows of other layers lie between.
    rows_per_block = key_cache.stride(0) // row_width
    rows = slot_mapping + (slot_mapping // block_size) * (rows_per_block - block_size)
    shape = ((key_cache.shape[0] - 1) * rows_per_block + block_size, row_width)
    for source, cache in ((key, key_cache), (value, value_cache)):
        flat = cache.as_strided(shape, (row_width, 1))  # [rows, num_kv_heads * head_dim]
        flat.index_copy_(0, rows, source.reshape(-1, row_width))


def plan_varlen_attention(cu_seqlens: Tensor, *, causal: bool, bias_table: Tensor | None = None) -> VarlenAttentionPlan:
    bounds = cu_seqlens.tolist()
    sequences = []
    for start, end in pairwise(bounds):
        mask = None
        if bias_table is not None:
            mask = _mask_of_reversed_queries(
                end - start, end - start, causal=causal, window=None, bias_table=bias_table
            )
        sequences.append(VarlenSequence(start, end, mask))
    return VarlenAttentionPlan(tuple(sequences), causal)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, plan: VarlenAttentionPlan, *, scale: float) -> Tensor:
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for sequence in plan.sequences:
        rows = slice(sequence.start, sequence.end)
        is_causal = plan.causal and sequence.mask is None
        output[rows] = _attend(query[rows], key[rows], value[rows], sequence.mask, is_causal, scale)
    return output


def plan_paged_attention(
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    block_size: int,
    causal: bool,
    window: int | None = None,
    bias_table: Tensor | None = None,
) -> PagedAttentionPlan:
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
        blocks = block_tables[row, : -(-context // block_size)]
        masked = bias_table is not None or (causal and (context > end - start > 1 or (window or context) < context))
        mask = None
        if masked:
            mask = _mask_of_reversed_queries(end - start, context, causal=causal, window=window, bias_table=bias_table)
        is_causal = causal and not masked and end - start > 1
        segments.append(QuerySegment(start, end, blocks, context, is_causal, mask))
    return PagedAttentionPlan(tuple(batches), tuple(segments))


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: PagedAttentionPlan,
    *,
    scale: float,
    soft_cap: float | None = None,
) -> Tensor:
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
            output[rows] = _attend(query[rows], keys, values, segment.mask, segment.is_causal, scale)
        else:
            output[rows] = _attend_capped(query[rows], keys, values, segment, scale, soft_cap)
    return output


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, segment: QuerySegment, scale: float, soft_cap: float
) -> Tensor:
    """As `_attend`, with capped scores."""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    mask = segment.mask
    if segment.is_causal:
        mask = _mask_of_reversed_queries(num_queries, len(key), causal=True, window=None, bias_table=None)
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


def apply_token_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    shifts = torch.arange(32, dtype=torch.int32, device=bitmask.device)
    allowed = ((bitmask[:, :, None] >> shifts) & 1).bool().flatten(1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill_(~allowed, -torch.inf)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """One sequence: query [queries, num_heads, head_dim], key and value [keys, num_kv_heads, head_dim].

    mask: as `_mask_of_reversed_queries` makes it.
    """
    attended = F.scaled_dot_product_attention(
        (query if mask is None else query.flip(0)).transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        attn_mask=None if mask is None else mask.unsqueeze(0),
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # [1, num_heads, queries, head_dim]
    output = attended.squeeze(0).transpose(0, 1)
    return output if mask is None else output.flip(0)


def _mask_of_reversed_queries(
    num_queries: int, num_keys: int, *, causal: bool, window: int | None, bias_table: Tensor | None
) -> Tensor:
    """[num_heads or 1, num_queries, num_keys]; row r is for query num_queries - 1 - r, row 0 at the last key.

    All masks here depend on the distance alone. In reversed order each row is the one before it, moved by one, so
    that the whole mask is a view of num_queries + num_keys - 1 numbers per head.
    """
    device = None if bias_table is None else bias_table.device
    distance = torch.arange(1 - num_keys, num_queries, device=device)
    mask = _bias(bias_table, distance)
    if causal:
        mask = mask.masked_fill(distance > 0, -torch.inf)
    if window is not None:
        mask = mask.masked_fill(distance <= -window, -torch.inf)
    return mask.unfold(1, num_keys, 1)


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
    bias = _bias(bias_table, distance).transpose(0, 1)  # [num_rows, num_heads or 1, num_keys]
    return bias.masked_fill(hidden[:, None], -torch.inf).unsqueeze(2)


def _bias(bias_table: Tensor | None, distance: Tensor) -> Tensor:
    """[num_heads, *distance.shape], or zeros [1, *distance.shape] without a table."""
    if bias_table is None:
        return torch.zeros((1, *distance.shape), device=distance.device)
    max_distance = bias_table.shape[1] // 2
    return bias_table[:, distance.clamp(-max_distance, max_distance) + max_distance]


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
