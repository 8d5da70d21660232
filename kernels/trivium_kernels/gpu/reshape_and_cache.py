"""`reshape_and_cache` in Triton. A token with a negative slot is written nowhere: it fills up a step of fixed size."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import ceil_div

_TILE = 1024


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    width = key_cache.shape[2] * key_cache.shape[3]
    if len(key) == 0:
        return
    key, value = key.flatten(1), value.flatten(1)  # views: the heads of a token lie side by side
    _reshape_and_cache_kernel[(len(key), ceil_div(width, _TILE))](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        value.stride(0),
        key_cache.stride(0),
        value_cache.stride(0),
        BLOCK_SIZE=key_cache.shape[1],
        WIDTH=width,
        TILE=_TILE,
        num_warps=4,
    )


@triton.jit
def _reshape_and_cache_kernel(
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    key_cache_ptr: tl.tensor,
    value_cache_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    key_block_stride: tl.tensor,
    value_block_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    mask = (columns < WIDTH) & (slot >= 0)
    place = slot % BLOCK_SIZE * WIDTH + columns
    key = tl.load(key_ptr + token * key_stride + columns, mask=mask, other=0.0)
    value = tl.load(value_ptr + token * value_stride + columns, mask=mask, other=0.0)
    tl.store(key_cache_ptr + slot // BLOCK_SIZE * key_block_stride + place, key, mask=mask)
    tl.store(value_cache_ptr + slot // BLOCK_SIZE * value_block_stride + place, value, mask=mask)
