"""`paged_attention` in Triton.

Leading rows with one query are computed by programs that each have a piece of a row's keys; the pieces are put
together afterwards (https://pytorch.org/blog/flash-decoding/). How a row is cut follows from its own number of keys.
Rows on end that read the same keys, as beams do in cross-attention, share the programs that read them. All other rows
are cut into tiles of queries. The plan of a batch of single queries holds tensors of fixed shapes and no number that
was read from the device, so a CUDA graph can replay it while block tables and lengths change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.attention import Scores, attend, attend_tiles, head_options, tiles_of_rows
from trivium_kernels.gpu.launch import ceil_div, power_of_two
from trivium_kernels.paged_attention import PagedAttentionPlan

# Of a row's keys. With 128 numbers of 16 bits a key, pieces of 256 add 0.8 % to the bytes of keys and values for every
# query head that reads them.
_MIN_PIECE = 256
_MAX_PIECES = tl.constexpr(32)
_MAX_TILE_HEADS = 64  # query heads of a program


@dataclass(frozen=True, slots=True)
class TritonPagedPlan(PagedAttentionPlan):
    """block_tables [num_rows, max_blocks], context_lens [num_rows]: as they were given, not copies.

    num_single: the leading rows with one query each. sharing: [num_single, 2] int32, the place of a row among those on
    end with the same keys and how many of them there are from it on, or None where that is not used. tiles: of the
    other rows.
    """

    block_tables: Tensor
    context_lens: Tensor
    num_single: int
    sharing: Tensor | None
    tiles: Tensor | None
    block_size: int
    scores: Scores


def plan_paged_attention(
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    block_size: int,
    causal: bool,
    window: int | None = None,
    bias_table: Tensor | None = None,
) -> TritonPagedPlan:
    bounds = cu_seqlens_q.tolist()
    num_rows, num_single = len(bounds) - 1, 0
    while num_single < num_rows and bounds[num_single + 1] == num_single + 1:
        num_single += 1
    rows = [(row, bounds[row], bounds[row + 1] - bounds[row]) for row in range(num_single, num_rows)]
    can_share = not causal and bias_table is None and num_single > 1
    return TritonPagedPlan(
        block_tables=block_tables,
        context_lens=context_lens,
        num_single=num_single,
        sharing=_sharing(block_tables[:num_single], context_lens[:num_single], block_size) if can_share else None,
        tiles=tiles_of_rows(rows, block_tables.device),
        block_size=block_size,
        scores=Scores(causal, window, bias_table),
    )


def _sharing(block_tables: Tensor, context_lens: Tensor, block_size: int) -> Tensor:
    """`TritonPagedPlan.sharing`, without waiting for the device."""
    num_rows, max_blocks = block_tables.shape
    rows = torch.arange(num_rows, device=block_tables.device)
    is_unused = torch.arange(max_blocks, device=block_tables.device) * block_size >= context_lens[1:, None]
    same = ((block_tables[1:] == block_tables[:-1]) | is_unused).all(dim=1) & (context_lens[1:] == context_lens[:-1])
    is_first = torch.cat((same.new_ones(1), ~same))
    first = torch.where(is_first, rows, 0).cummax(dim=0).values
    next_first = torch.cat((torch.where(is_first, rows, num_rows)[1:], rows.new_full((1,), num_rows)))
    end = next_first.flip(0).cummin(dim=0).values.flip(0)
    return torch.stack((rows - first, end - rows), dim=1).int()


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: PagedAttentionPlan,
    *,
    scale: float,
    soft_cap: float | None = None,
) -> Tensor:
    assert isinstance(plan, TritonPagedPlan), "the plan is of another device"
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if plan.num_single:
        _attend_single(query, key_cache, value_cache, output, plan, scale, soft_cap)
    if plan.tiles is not None:
        rows = plan.block_tables, plan.context_lens
        attend_tiles(
            query,
            (key_cache, value_cache),
            output,
            plan.tiles,
            rows,
            scores=plan.scores,
            scale=scale,
            soft_cap=soft_cap,
        )
    return output


def _attend_single(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    plan: TritonPagedPlan,
    scale: float,
    soft_cap: float | None,
) -> None:
    num_kv_heads, scores = key_cache.shape[2], plan.scores
    options = head_options(query, num_kv_heads, scores, soft_cap)
    tile_heads = min(_MAX_TILE_HEADS, power_of_two(options["GROUP"]))
    chunks = ceil_div(options["GROUP"], tile_heads)
    sharing_rows = 1 if plan.sharing is None else max(1, 16 // tile_heads)
    max_keys = plan.block_tables.shape[1] * plan.block_size
    if scores.window is not None:
        max_keys = min(max_keys, scores.window + options["KEY_TILE"])
    num_pieces = min(_MAX_PIECES.value, ceil_div(max_keys, _MIN_PIECE))
    shape = (plan.num_single, query.shape[1], num_pieces)
    sums = torch.empty((*shape, query.shape[2]), dtype=torch.float32, device=query.device) if num_pieces > 1 else None
    stats = torch.empty((*shape, 2), dtype=torch.float32, device=query.device) if num_pieces > 1 else None
    _attend_single_kernel[(plan.num_single, num_kv_heads * chunks, num_pieces)](
        query,
        key_cache,
        value_cache,
        output,
        sums,
        stats,
        plan.block_tables,
        plan.context_lens,
        plan.sharing if sharing_rows > 1 else None,
        scores.bias_table,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        value_cache.stride(0),
        key_cache.stride(1),
        value_cache.stride(1),
        key_cache.stride(2),
        value_cache.stride(2),
        plan.block_tables.stride(0),
        0 if scores.bias_table is None else scores.bias_table.stride(0),
        scale,
        soft_cap or 0.0,
        scores.window or 0,
        0 if scores.bias_table is None else scores.bias_table.shape[1] // 2,
        num_pieces,
        NUM_HEADS=query.shape[1],
        BLOCK_SIZE=plan.block_size,
        QUERIES=max(16, sharing_rows * tile_heads),
        HEADS=tile_heads,
        CHUNKS=chunks,
        SHARING_ROWS=sharing_rows,
        MIN_PIECE=_MIN_PIECE,
        **options,
        num_warps=4,
    )
    if sums is not None:
        _join_pieces_kernel[(plan.num_single, query.shape[1])](
            output,
            sums,
            stats,
            plan.context_lens,
            scores.window or 0,
            num_pieces,
            NUM_HEADS=query.shape[1],
            HEAD_DIM=query.shape[2],
            HEAD_TILE=options["HEAD_TILE"],
            KEY_TILE=options["KEY_TILE"],
            MIN_PIECE=_MIN_PIECE,
            HAS_WINDOW=scores.window is not None,
            num_warps=4,
        )


@triton.jit
def _pieces(
    context_len: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    KEY_TILE: tl.constexpr,
    MIN_PIECE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(first key, keys of a piece) of a single query; a row has as many pieces as its keys fill, by itself."""
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(context_len - window, 0) // KEY_TILE * KEY_TILE
    share = (context_len - low + _MAX_PIECES - 1) // _MAX_PIECES
    size = tl.maximum((share + KEY_TILE - 1) // KEY_TILE * KEY_TILE, MIN_PIECE)
    return low, size


@triton.jit(do_not_specialize=["table_stride", "num_pieces"])
def _attend_single_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    output_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    sharing_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_block_stride: tl.tensor,
    value_block_stride: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_head_stride: tl.tensor,
    table_stride: tl.tensor,
    bias_stride: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    window: tl.tensor,
    max_distance: tl.tensor,
    num_pieces: tl.tensor,
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SHARING_ROWS: tl.constexpr,
    MIN_PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """A program has one piece of the keys of SHARING_ROWS rows or fewer, and HEADS heads of each.

    A row of one piece is finished here. A row without keys, which fills up a batch of fixed size, becomes zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    num_rows = 1
    if sharing_ptr is not None:
        place = tl.load(sharing_ptr + row * 2)
        num_rows = tl.where(place % SHARING_ROWS == 0, tl.load(sharing_ptr + row * 2 + 1), 0)
    context_len = tl.load(context_lens_ptr + row).to(tl.int32)
    low, size = _pieces(context_len, window, HAS_WINDOW, KEY_TILE, MIN_PIECE)
    piece = tl.program_id(2)
    begin = low + piece * size
    if (num_rows > 0) & ((begin < context_len) | (piece == 0)):
        kv_head = (tl.program_id(1) // CHUNKS).to(tl.int64)
        places = tl.arange(0, QUERIES)
        group_heads = tl.program_id(1) % CHUNKS * HEADS + places % HEADS
        is_query = (group_heads < GROUP) & (places // HEADS < tl.minimum(num_rows, SHARING_ROWS))
        rows = row + tl.where(is_query, places // HEADS, 0)
        heads = kv_head * GROUP + tl.where(is_query, group_heads, 0)
        columns = tl.arange(0, HEAD_TILE)
        mask = is_query[:, None] & (columns < HEAD_DIM)[None, :]
        query_offsets = rows * query_token_stride + heads * query_head_stride
        query = tl.load(query_ptr + query_offsets[:, None] + columns[None, :], mask=mask, other=0.0)
        sums, total, highest = attend(
            query.to(DOT),
            tl.zeros([QUERIES], tl.int32) + context_len - 1,
            bias_ptr + heads * bias_stride + max_distance if HAS_BIAS else tables_ptr,
            key_ptr + kv_head * key_head_stride,
            value_ptr + kv_head * value_head_stride,
            tables_ptr + row * table_stride,
            begin,
            tl.minimum(begin + size, context_len),
            key_block_stride,
            value_block_stride,
            key_stride,
            value_stride,
            scale,
            soft_cap,
            window,
            max_distance,
            BLOCK_SIZE,
            QUERIES,
            HEAD_DIM,
            HEAD_TILE,
            KEY_TILE,
            CAUSAL,
            HAS_WINDOW,
            HAS_BIAS,
            HAS_CAP,
            DOT,
        )
        outputs = rows * NUM_HEADS + heads
        if low + size >= context_len:
            attended = sums / tl.where(total > 0.0, total, 1.0)[:, None]
            tl.store(output_ptr + outputs[:, None] * HEAD_DIM + columns[None, :], attended, mask=mask)
        elif sums_ptr is not None:
            pieces = outputs * num_pieces + piece
            tl.store(sums_ptr + pieces[:, None] * HEAD_DIM + columns[None, :], sums, mask=mask)
            tl.store(stats_ptr + pieces * 2, total, mask=is_query)
            tl.store(stats_ptr + pieces * 2 + 1, highest, mask=is_query)


@triton.jit(do_not_specialize=["num_pieces"])
def _join_pieces_kernel(
    output_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    window: tl.tensor,
    num_pieces: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    MIN_PIECE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    """One head of one row, if it has more than one piece: sum_i 2^(highest_i) sums_i / sum_i 2^(highest_i) total_i."""
    row = tl.program_id(0).to(tl.int64)
    context_len = tl.load(context_lens_ptr + row).to(tl.int32)
    low, size = _pieces(context_len, window, HAS_WINDOW, KEY_TILE, MIN_PIECE)
    if low + size < context_len:
        output = row * NUM_HEADS + tl.program_id(1)
        pieces = tl.arange(0, _MAX_PIECES)
        is_piece = low + pieces * size < context_len
        columns = tl.arange(0, HEAD_TILE)
        stats = stats_ptr + (output * num_pieces + pieces) * 2
        total = tl.load(stats, mask=is_piece, other=0.0)
        highest = tl.load(stats + 1, mask=is_piece, other=float("-inf"))
        weights = tl.exp2(highest - tl.max(highest, axis=0))
        sums = tl.load(
            sums_ptr + (output * num_pieces + pieces)[:, None] * HEAD_DIM + columns[None, :],
            mask=is_piece[:, None] & (columns < HEAD_DIM)[None, :],
            other=0.0,
        )
        attended = tl.sum(sums * weights[:, None], axis=0) / tl.sum(total * weights, axis=0)
        tl.store(output_ptr + output * HEAD_DIM + columns, attended, mask=columns < HEAD_DIM)
