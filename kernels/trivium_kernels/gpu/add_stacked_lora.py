"""`add_stacked_lora` in Triton: rows of one adapter in tiles, so that its matrices are read once for all of them.

There are programs for as many tiles as any adapter could have; those without rows end at once. The inputs of a shrink
are split among programs by the shape of the layer alone, so a row comes out the same whatever rows are beside it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.add_stacked_lora import AdapterRows, LoraStack
from trivium_kernels.gpu.launch import ceil_div, dot_type, power_of_two

_ROWS = 16
_IN_TILE = 64
_IN_PART = 512  # inputs of a program that shrinks
_OUT_TILE = 64


def add_stacked_lora(y: Tensor, x: Tensor, rows: AdapterRows, stack: LoraStack) -> None:
    num_rows, in_features = x.shape
    if num_rows == 0:
        return
    num_adapters, num_ranks = stack.shrink.shape[:2]
    num_parts = ceil_div(in_features, _IN_PART)
    row_tiles = ceil_div(num_rows, _ROWS)
    shrunk = torch.empty((num_parts, num_rows, num_ranks), dtype=torch.float32, device=x.device)
    _shrink_kernel[(num_adapters, row_tiles, num_parts)](
        x,
        stack.shrink,
        rows.order,
        rows.starts,
        shrunk,
        num_rows,
        x.stride(0),
        IN_FEATURES=in_features,
        NUM_RANKS=num_ranks,
        RANKS=max(16, power_of_two(num_ranks)),
        PART=_IN_PART,
        ROWS=_ROWS,
        INS=_IN_TILE,
        DOT=dot_type(x),
        num_warps=4,
    )
    for part, (start, end) in enumerate(pairwise(stack.bounds)):
        _expand_kernel[(num_adapters, row_tiles, ceil_div(end - start, _OUT_TILE))](
            shrunk,
            stack.expand,
            rows.order,
            rows.starts,
            y,
            num_rows,
            y.stride(0),
            start,
            end,
            part * stack.max_rank,
            OUT_FEATURES=stack.bounds[-1],
            NUM_RANKS=num_ranks,
            MAX_RANK=stack.max_rank,
            RANKS=max(16, power_of_two(stack.max_rank)),
            NUM_PARTS=num_parts,
            ROWS=_ROWS,
            OUTS=_OUT_TILE,
            DOT=dot_type(x),
            num_warps=4,
        )


@triton.jit(do_not_specialize=["num_rows"])
def _shrink_kernel(
    x_ptr: tl.tensor,
    shrink_ptr: tl.tensor,
    order_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    shrunk_ptr: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    IN_FEATURES: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    RANKS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    INS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """shrunk[part, row] = x[row] A^T over the inputs of a part."""
    adapter, part = tl.program_id(0), tl.program_id(2)
    places = tl.load(starts_ptr + adapter) + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    end = tl.load(starts_ptr + adapter + 1)
    if tl.min(places, axis=0) < end:
        is_row = places < end
        rows = tl.load(order_ptr + places, mask=is_row, other=0)
        ranks = tl.arange(0, RANKS)
        shrink_ptr += adapter.to(tl.int64) * NUM_RANKS * IN_FEATURES
        sums = tl.zeros([ROWS, RANKS], tl.float32)
        for start in range(part * PART, tl.minimum(part * PART + PART, IN_FEATURES), INS):
            inputs = start + tl.arange(0, INS)
            is_input = inputs < IN_FEATURES
            x_ptrs = x_ptr + rows[:, None] * x_stride + inputs[None, :]
            x = tl.load(x_ptrs, mask=is_row[:, None] & is_input[None, :], other=0.0)
            shrink = tl.load(
                shrink_ptr + ranks[None, :] * IN_FEATURES + inputs[:, None],
                mask=(ranks < NUM_RANKS)[None, :] & is_input[:, None],
                other=0.0,
            )  # [INS, RANKS]
            sums = tl.dot(x.to(DOT), shrink.to(DOT), sums, input_precision="tf32x3")
        shrunk_ptrs = shrunk_ptr + (part * num_rows + rows)[:, None] * NUM_RANKS + ranks[None, :]
        tl.store(shrunk_ptrs, sums, mask=is_row[:, None] & (ranks < NUM_RANKS)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _expand_kernel(
    shrunk_ptr: tl.tensor,
    expand_ptr: tl.tensor,
    order_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_rows: tl.tensor,
    y_stride: tl.tensor,
    first_output: tl.tensor,
    last_output: tl.tensor,
    first_rank: tl.tensor,
    OUT_FEATURES: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANKS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """y[row, first_output : last_output] += shrunk[row, first_rank : first_rank + MAX_RANK] B^T."""
    adapter = tl.program_id(0)
    places = tl.load(starts_ptr + adapter) + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    end = tl.load(starts_ptr + adapter + 1)
    if tl.min(places, axis=0) < end:
        is_row = places < end
        rows = tl.load(order_ptr + places, mask=is_row, other=0)
        ranks = tl.arange(0, RANKS)
        is_rank = ranks < MAX_RANK
        shrunk = tl.zeros([ROWS, RANKS], tl.float32)
        for part in range(NUM_PARTS):
            shrunk_ptrs = shrunk_ptr + (part * num_rows + rows)[:, None] * NUM_RANKS + (first_rank + ranks)[None, :]
            shrunk += tl.load(shrunk_ptrs, mask=is_row[:, None] & is_rank[None, :], other=0.0)
        outputs = first_output + tl.program_id(2) * OUTS + tl.arange(0, OUTS)
        is_output = outputs < last_output
        expand_ptr += adapter.to(tl.int64) * OUT_FEATURES * MAX_RANK
        expand = tl.load(
            expand_ptr + outputs[None, :] * MAX_RANK + ranks[:, None],
            mask=is_output[None, :] & is_rank[:, None],
            other=0.0,
        )  # [RANKS, OUTS]
        y_ptrs = y_ptr + rows[:, None] * y_stride + outputs[None, :]
        mask = is_row[:, None] & is_output[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        y = tl.dot(shrunk.to(DOT), expand.to(DOT), y, input_precision="tf32x3")
        tl.store(y_ptrs, y, mask=mask)
