"""`copy_blocks` in Triton. Both pools are memory of the device: to the host goes a copy of what was gathered here."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import ceil_div

_TILE = 4096


def copy_blocks(source: Tensor, target: Tensor, from_blocks: Tensor, to_blocks: Tensor) -> None:
    block_numel = source[0].numel()
    if len(from_blocks):
        _copy_blocks_kernel[(len(from_blocks), ceil_div(block_numel, _TILE))](
            source,
            target,
            from_blocks,
            to_blocks,
            source.stride(0),
            target.stride(0),
            BLOCK_NUMEL=block_numel,
            TILE=_TILE,
            num_warps=8,
        )


@triton.jit
def _copy_blocks_kernel(
    source_ptr: tl.tensor,
    target_ptr: tl.tensor,
    from_ptr: tl.tensor,
    to_ptr: tl.tensor,
    source_stride: tl.tensor,
    target_stride: tl.tensor,
    BLOCK_NUMEL: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    pair = tl.program_id(0)
    from_block = tl.load(from_ptr + pair).to(tl.int64)
    to_block = tl.load(to_ptr + pair).to(tl.int64)
    places = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = (places < BLOCK_NUMEL) & (from_block >= 0) & (to_block >= 0)
    values = tl.load(source_ptr + from_block * source_stride + places, mask=mask)
    tl.store(target_ptr + to_block * target_stride + places, values, mask=mask)
