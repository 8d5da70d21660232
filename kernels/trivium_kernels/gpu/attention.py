"""What both attention ops have in common: a tile of queries against a range of keys, and the kernel for long rows.

Softmax is computed while the keys go by (https://arxiv.org/abs/1805.02867, https://arxiv.org/abs/2205.14135), in powers
of two. The queries of a tile are tokens times the query heads that read one key head, so that a key is read once for
all of them. Each tile of keys is added in the same order whatever else is in the batch. Products of float32 are made
of three of TF32 each, which has its accuracy and not its speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import ceil_div, dot_type, power_of_two

TILE_TOKENS = 64  # of a row, that one entry of a list of tiles stands for
LOG2_E = tl.constexpr(1.4426950408889634)
_MAX_TILE_HEADS = 4  # query heads in a tile; with more of them tiles would have few tokens, and those keys in common
_TILE_BYTES = 16384  # of keys: 64 keys of 128 numbers of 16 bits


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores are made, the same for all rows. bias_table [num_heads, 2 * max_distance + 1] or None."""

    causal: bool
    window: int | None
    bias_table: Tensor | None


def tiles_of_rows(rows: list[tuple[int, int, int]], device: torch.device) -> Tensor | None:
    """[num_tiles, 4] int32: (row, first token in the pack, first query in its row, queries of the row).

    rows: (row, first token, number of queries) of each row that is cut into tiles. None without tiles.
    """
    tiles = [
        (row, token + query, query, num_queries)
        for row, token, num_queries in rows
        for query in range(0, num_queries, TILE_TOKENS)
    ]
    return torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True) if tiles else None


def head_options(query: Tensor, num_kv_heads: int, scores: Scores, soft_cap: float | None) -> dict[str, Any]:
    """The constants of a kernel that follow from the model."""
    head_dim = query.shape[2]
    head_tile = max(16, power_of_two(head_dim))
    row_bytes = head_tile * query.element_size()
    return {
        "GROUP": query.shape[1] // num_kv_heads,
        "HEAD_DIM": head_dim,
        "HEAD_TILE": head_tile,
        "KEY_TILE": min(64, max(16, _TILE_BYTES // row_bytes)),
        "CAUSAL": scores.causal,
        "HAS_WINDOW": scores.window is not None,
        "HAS_BIAS": scores.bias_table is not None,
        "HAS_CAP": soft_cap is not None,
        "DOT": dot_type(query),
        "num_stages": 2,
    }


def attend_tiles(
    query: Tensor,
    keys: tuple[Tensor, Tensor],
    output: Tensor,
    tiles: Tensor,
    rows: tuple[Tensor, Tensor] | None,
    *,
    scores: Scores,
    scale: float,
    soft_cap: float | None,
) -> None:
    """Attention of the queries that `tiles` lists.

    keys: (keys, values), caches [num_blocks, block_size, num_kv_heads, head_dim] read by way of rows = (block tables,
    context lengths), or packed [num_tokens, num_kv_heads, head_dim] where `rows` is None: then keys are those of the
    queries' own row.
    """
    key, value = keys
    num_kv_heads = key.shape[-2]
    options = head_options(query, num_kv_heads, scores, soft_cap)
    row_bytes = options["HEAD_TILE"] * query.element_size()
    tile_heads = min(_MAX_TILE_HEADS, power_of_two(options["GROUP"]))
    queries = 64 if query.element_size() == 2 or row_bytes <= 256 else 32  # what registers can hold
    tokens, chunks = queries // tile_heads, ceil_div(options["GROUP"], tile_heads)
    tables, context_lens = (None, None) if rows is None else rows
    _attend_tiles_kernel[(len(tiles), TILE_TOKENS // tokens, num_kv_heads * chunks)](
        query,
        key,
        value,
        output,
        tiles,
        tables,
        context_lens,
        scores.bias_table,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        value.stride(0),
        key.stride(-3),
        value.stride(-3),
        key.stride(-2),
        value.stride(-2),
        0 if tables is None else tables.stride(0),
        0 if scores.bias_table is None else scores.bias_table.stride(0),
        scale,
        soft_cap or 0.0,
        scores.window or 0,
        0 if scores.bias_table is None else scores.bias_table.shape[1] // 2,
        NUM_HEADS=query.shape[1],
        BLOCK_SIZE=0 if tables is None else key.shape[1],
        TOKENS=tokens,
        HEADS=tile_heads,
        CHUNKS=chunks,
        **options,
        num_warps=4 if row_bytes <= 256 else 8,
    )


@triton.jit
def attend(
    query: tl.tensor,
    positions: tl.tensor,
    bias_ptrs: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    table_ptr: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    key_block_stride: tl.tensor,
    value_block_stride: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    window: tl.tensor,
    max_distance: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DOT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """query [QUERIES, HEAD_TILE] at `positions` [QUERIES] against the keys [low, high) of one key head of one row.

    bias_ptrs [QUERIES]: where the bias of distance 0 is. Returns the weighted sum of values [QUERIES, HEAD_TILE], the
    sum of weights [QUERIES], and the largest score [QUERIES] times log2(e), which both are relative to.
    """
    columns = tl.arange(0, HEAD_TILE)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, HEAD_TILE], tl.float32)
    for start in range(low, high, KEY_TILE):
        keys = start + tl.arange(0, KEY_TILE)
        seen = keys < high
        if BLOCK_SIZE > 0:
            blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
            key_offsets = blocks * key_block_stride + keys % BLOCK_SIZE * key_stride
            value_offsets = blocks * value_block_stride + keys % BLOCK_SIZE * value_stride
        else:
            key_offsets = keys.to(tl.int64) * key_stride
            value_offsets = keys.to(tl.int64) * value_stride
        key = tl.load(
            key_ptr + key_offsets[None, :] + columns[:, None],
            mask=seen[None, :] & (columns < HEAD_DIM)[:, None],
            other=0.0,
        )  # [HEAD_TILE, KEY_TILE]
        scores = tl.dot(query, key.to(DOT), input_precision="tf32x3") * scale
        if HAS_CAP:
            scores = (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0) * soft_cap
        distance = keys[None, :] - positions[:, None]
        visible = tl.broadcast_to(seen[None, :], [QUERIES, KEY_TILE])
        if CAUSAL:
            visible = visible & (distance <= 0)
        if HAS_WINDOW:
            visible = visible & (distance > -window)
        if HAS_BIAS:
            nearest = tl.minimum(tl.maximum(distance, -max_distance), max_distance)
            scores += tl.load(bias_ptrs[:, None] + nearest, mask=visible, other=0.0).to(tl.float32)
        scores = tl.where(visible, scores * LOG2_E, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # where nothing is visible yet
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(highest - base)
        value = tl.load(
            value_ptr + value_offsets[:, None] + columns[None, :],
            mask=seen[:, None] & (columns < HEAD_DIM)[None, :],
            other=0.0,
        )  # [KEY_TILE, HEAD_TILE]
        total = total * decay + tl.sum(weights, axis=1)
        sums = sums * decay[:, None]
        sums = tl.dot(weights.to(DOT), value.to(DOT), sums, input_precision="tf32x3")
        highest = new_highest
    return sums, total, highest


@triton.jit(do_not_specialize=["table_stride"])
def _attend_tiles_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    output_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
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
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
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
    """A program has TOKENS queries of a row and HEADS of the heads that read one key head."""
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    row = tl.load(tile_ptr).to(tl.int64)
    skipped = tl.program_id(1) * TOKENS
    first_token = tl.load(tile_ptr + 1).to(tl.int64) + skipped
    first_query = tl.load(tile_ptr + 2) + skipped
    num_queries = tl.load(tile_ptr + 3)
    if first_query < num_queries:
        kv_head = (tl.program_id(2) // CHUNKS).to(tl.int64)
        places = tl.arange(0, TOKENS * HEADS)
        tokens = places // HEADS
        group_heads = tl.program_id(2) % CHUNKS * HEADS + places % HEADS
        is_query = (group_heads < GROUP) & (first_query + tokens < num_queries)
        heads = kv_head * GROUP + tl.where(is_query, group_heads, 0)
        columns = tl.arange(0, HEAD_TILE)
        mask = is_query[:, None] & (columns < HEAD_DIM)[None, :]
        query_offsets = (first_token + tokens) * query_token_stride + heads * query_head_stride
        query = tl.load(query_ptr + query_offsets[:, None] + columns[None, :], mask=mask, other=0.0)
        if BLOCK_SIZE > 0:
            context_len = tl.load(context_lens_ptr + row)
            key_start, value_start = key_ptr, value_ptr
            table_ptr = tables_ptr + row * table_stride
        else:
            context_len = num_queries
            key_start = key_ptr + (first_token - first_query) * key_stride
            value_start = value_ptr + (first_token - first_query) * value_stride
            table_ptr = tiles_ptr
        first_position = context_len - num_queries + first_query
        low = 0
        high = context_len
        if CAUSAL:
            high = tl.minimum(high, first_position + TOKENS)
        if HAS_WINDOW:
            low = tl.maximum(first_position - window + 1, 0) // KEY_TILE * KEY_TILE
        sums, total, _ = attend(
            query.to(DOT),
            first_position + tokens,
            bias_ptr + heads * bias_stride + max_distance if HAS_BIAS else tiles_ptr,
            key_start + kv_head * key_head_stride,
            value_start + kv_head * value_head_stride,
            table_ptr,
            low,
            high,
            key_block_stride,
            value_block_stride,
            key_stride,
            value_stride,
            scale,
            soft_cap,
            window,
            max_distance,
            BLOCK_SIZE,
            TOKENS * HEADS,
            HEAD_DIM,
            HEAD_TILE,
            KEY_TILE,
            CAUSAL,
            HAS_WINDOW,
            HAS_BIAS,
            HAS_CAP,
            DOT,
        )
        attended = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        output_offsets = ((first_token + tokens) * NUM_HEADS + heads) * HEAD_DIM
        tl.store(output_ptr + output_offsets[:, None] + columns[None, :], attended, mask=mask)
