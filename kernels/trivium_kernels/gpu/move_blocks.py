"""`move_blocks` in Triton: one program for each group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import power_of_two
from trivium_kernels.move_blocks import BlockCopies

_COLUMNS = 32  # of the tables at a time


def move_blocks(
    block_tables: Tensor, slots: Tensor, parents: Tensor, num_tokens: Tensor, *, block_size: int
) -> BlockCopies:
    num_groups, max_width = slots.shape
    before = block_tables.index_select(0, slots.flatten().clamp(min=0))  # beams read what others overwrite
    copies = torch.empty((2, num_groups * max_width), dtype=torch.int64, device=block_tables.device)
    if num_groups:
        _move_blocks_kernel[(num_groups,)](
            block_tables,
            before,
            slots,
            parents,
            num_tokens,
            copies[0],
            copies[1],
            block_tables.stride(0),
            before.stride(0),
            BLOCK_SIZE=block_size,
            MAX_WIDTH=max_width,
            BEAMS=power_of_two(max(max_width, 2)),
            COLUMNS=_COLUMNS,
            num_warps=4,
        )
    return BlockCopies(copies[0], copies[1])


@triton.jit
def _move_blocks_kernel(
    tables_ptr: tl.tensor,
    before_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    parents_ptr: tl.tensor,
    num_tokens_ptr: tl.tensor,
    from_ptr: tl.tensor,
    to_ptr: tl.tensor,
    tables_stride: tl.tensor,
    before_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    MAX_WIDTH: tl.constexpr,
    BEAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * MAX_WIDTH
    beams = tl.arange(0, BEAMS)
    slots = tl.load(slots_ptr + first + beams, mask=beams < MAX_WIDTH, other=-1)
    is_beam = slots >= 0
    parents = tl.load(parents_ptr + first + beams, mask=is_beam, other=-1).to(tl.int32)
    num_tokens = tl.load(num_tokens_ptr + tl.program_id(0)).to(tl.int32)
    num_full = num_tokens // BLOCK_SIZE
    own = tables_ptr + slots * tables_stride
    old = before_ptr + (first + parents) * before_stride
    for start in range(0, num_full, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = is_beam[:, None] & (columns < num_full)[None, :]
        blocks = tl.load(old[:, None] + columns[None, :], mask=mask, other=0)
        tl.store(own[:, None] + columns[None, :], blocks, mask=mask)

    has_partial = num_tokens % BLOCK_SIZE > 0
    # [child, other]: a child with a parent that an earlier one has is too many for one block.
    is_same = (parents[:, None] == parents[None, :]) & (beams[None, :] < beams[:, None]) & is_beam[None, :]
    is_extra = is_beam & (tl.sum(is_same.to(tl.int32), axis=1) > 0) & has_partial
    is_child_of = (parents[:, None] == beams[None, :]) & is_beam[:, None]
    is_childless = is_beam & (tl.sum(is_child_of.to(tl.int32), axis=0) == 0)
    extra_rank = tl.cumsum(is_extra.to(tl.int32), axis=0)
    childless_rank = tl.cumsum(is_childless.to(tl.int32), axis=0)
    gives = (extra_rank[:, None] == childless_rank[None, :]) & is_childless[None, :]
    givers = tl.where(is_extra, tl.sum(tl.where(gives, beams[None, :], 0), axis=1), parents)
    source = tl.load(old + num_full, mask=is_beam & has_partial, other=-1)
    block = tl.load(before_ptr + (first + givers) * before_stride + num_full, mask=is_beam & has_partial, other=-1)
    tl.store(own + num_full, block, mask=is_beam & has_partial)
    is_place = beams < MAX_WIDTH
    tl.store(from_ptr + first + beams, tl.where(is_extra, source, -1).to(tl.int64), mask=is_place)
    tl.store(to_ptr + first + beams, tl.where(is_extra, block, -1).to(tl.int64), mask=is_place)
