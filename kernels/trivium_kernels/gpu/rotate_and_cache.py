"""`rotate_and_cache` in Triton: every element of the merged projection is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import ceil_div
from trivium_kernels.gpu.rotary_embedding import HEADS, rotary_tiles, rotated
from trivium_kernels.rotate_and_cache import HeadNorms


def rotate_and_cache(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    norms: HeadNorms | None = None,
) -> Tensor:
    num_tokens, num_all, head_dim = qkv.shape
    num_kv_heads, (cos, sin) = key_cache.shape[2], rotation
    num_heads = num_all - 2 * num_kv_heads
    query = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        _rotate_and_cache_kernel[(num_tokens, ceil_div(num_all, HEADS))](
            qkv,
            cos,
            sin,
            None if norms is None else norms.query,
            None if norms is None else norms.key,
            query,
            key_cache,
            value_cache,
            slot_mapping,
            qkv.stride(0),
            qkv.stride(1),
            cos.stride(0),
            sin.stride(0),
            key_cache.stride(0),
            value_cache.stride(0),
            0.0 if norms is None else norms.eps,
            BLOCK_SIZE=key_cache.shape[1],
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HEADS=HEADS,
            **rotary_tiles(head_dim, cos.shape[-1]),
            num_warps=4,
        )
    return query


@triton.jit
def _rotate_and_cache_kernel(
    qkv_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    query_norm_ptr: tl.tensor,
    key_norm_ptr: tl.tensor,
    query_ptr: tl.tensor,
    key_cache_ptr: tl.tensor,
    value_cache_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    key_block_stride: tl.tensor,
    value_block_stride: tl.tensor,
    eps: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
) -> None:
    """A program has HEADS heads of one token, which may be queries, keys and values."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    is_query, is_value = heads < NUM_HEADS, heads >= NUM_HEADS + NUM_KV_HEADS
    slot = tl.load(slot_ptr + token).to(tl.int64)
    is_key = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS) & (slot >= 0)
    is_kept_value = is_value & (heads < NUM_HEADS + 2 * NUM_KV_HEADS) & (slot >= 0)
    is_head = heads < NUM_HEADS + 2 * NUM_KV_HEADS

    place = slot % BLOCK_SIZE * (NUM_KV_HEADS * HEAD_DIM)
    query_ptrs = query_ptr + (token * NUM_HEADS + heads) * HEAD_DIM
    key_ptrs = key_cache_ptr + slot // BLOCK_SIZE * key_block_stride + place + (heads - NUM_HEADS) * HEAD_DIM
    value_heads = heads - (NUM_HEADS + NUM_KV_HEADS)
    value_ptrs = value_cache_ptr + slot // BLOCK_SIZE * value_block_stride + place + value_heads * HEAD_DIM

    x_ptrs = qkv_ptr + token * token_stride + heads * head_stride
    columns = tl.arange(0, HALF_TILE)[None, :]
    mask = is_head & (columns < HALF)
    first = tl.load(x_ptrs + columns, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + HALF + columns, mask=mask, other=0.0).to(tl.float32)
    if REST_TILE > 0:
        rest_columns = 2 * HALF + tl.arange(0, REST_TILE)[None, :]
        rest_mask = is_head & (rest_columns < HEAD_DIM)
        rest = tl.load(x_ptrs + rest_columns, mask=rest_mask, other=0.0).to(tl.float32)
    if query_norm_ptr is not None:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        if REST_TILE > 0:
            square += tl.sum(rest * rest, axis=1)
        scale = tl.where(is_value, 1.0, (1.0 / tl.sqrt(square / HEAD_DIM + eps))[:, None])
        first *= scale * _norm_weight(query_norm_ptr, key_norm_ptr, columns, columns < HALF, is_query, is_value)
        second *= scale * _norm_weight(query_norm_ptr, key_norm_ptr, HALF + columns, columns < HALF, is_query, is_value)
        if REST_TILE > 0:
            in_head = rest_columns < HEAD_DIM
            rest *= scale * _norm_weight(query_norm_ptr, key_norm_ptr, rest_columns, in_head, is_query, is_value)
    new_first, new_second = rotated(
        first, second, cos_ptr + token * cos_stride, sin_ptr + token * sin_stride, HALF, HALF_TILE
    )
    first, second = tl.where(is_value, first, new_first), tl.where(is_value, second, new_second)

    tl.store(query_ptrs + columns, first, mask=mask & is_query)
    tl.store(query_ptrs + HALF + columns, second, mask=mask & is_query)
    tl.store(key_ptrs + columns, first, mask=mask & is_key)
    tl.store(key_ptrs + HALF + columns, second, mask=mask & is_key)
    tl.store(value_ptrs + columns, first, mask=mask & is_kept_value)
    tl.store(value_ptrs + HALF + columns, second, mask=mask & is_kept_value)
    if REST_TILE > 0:
        tl.store(query_ptrs + rest_columns, rest, mask=rest_mask & is_query)
        tl.store(key_ptrs + rest_columns, rest, mask=rest_mask & is_key)
        tl.store(value_ptrs + rest_columns, rest, mask=rest_mask & is_kept_value)


@triton.jit
def _norm_weight(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    is_query: tl.tensor,
    is_value: tl.tensor,
) -> tl.tensor:
    """[HEADS, columns] the weights of the head's kind; 1 for values."""
    query = tl.load(query_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    key = tl.load(key_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_value, 1.0, tl.where(is_query, query, key))
