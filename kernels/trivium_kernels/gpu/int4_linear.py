"""`int4_linear` in Triton: few rows meet values that are unpacked in registers, many a weight that was unpacked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import ceil_div, dot_type
from trivium_kernels.gpu.split_k import MAX_ROWS, OUT_TILE, ROW_TILE, add_parts, new_parts, split
from trivium_kernels.int4_linear import SLICE, SLICES, Int4Weight


def int4_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    num_rows, out_features = len(x), weight.out_features
    if num_rows > MAX_ROWS:
        dense = _dequantized(weight, x.dtype)
        return x @ dense if bias is None else torch.addmm(bias, x, dense)
    y = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    num_blocks = len(weight.words) // SLICE
    parts, blocks_of_part = split(out_features, num_blocks)
    sums = new_parts(x, parts, out_features)
    _int4_linear_kernel[(ceil_div(out_features, OUT_TILE), parts, ceil_div(num_rows, ROW_TILE))](
        x,
        weight.words,
        weight.slice_groups,
        weight.scales,
        weight.zeros,
        weight.inputs,
        sums,
        num_rows,
        x.stride(0),
        IN_FEATURES=weight.in_features,
        OUT_FEATURES=out_features,
        NUM_BLOCKS=num_blocks,
        PART=blocks_of_part,
        ROWS=ROW_TILE,
        OUTS=OUT_TILE,
        SLICE=SLICE,
        SLICES=SLICES,
        DOT=dot_type(x),
        num_warps=4,
        num_stages=2,
    )
    add_parts(sums, bias, y)
    return y


def _dequantized(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """[in_features, out_features]."""
    num_blocks = len(weight.words) // SLICE
    dense = torch.empty((weight.in_features, weight.out_features), dtype=dtype, device=weight.words.device)
    _dequantize_int4_kernel[(num_blocks, ceil_div(weight.out_features, OUT_TILE))](
        weight.words,
        weight.slice_groups,
        weight.scales,
        weight.zeros,
        weight.inputs,
        dense,
        IN_FEATURES=weight.in_features,
        OUT_FEATURES=weight.out_features,
        OUTS=OUT_TILE,
        SLICE=SLICE,
        SLICES=SLICES,
        num_warps=4,
    )
    return dense


@triton.jit
def _slice_weight(
    words: tl.tensor,
    index: tl.constexpr,
    group: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    columns: tl.tensor,
    OUT_FEATURES: tl.constexpr,
) -> tl.tensor:
    """float32 [SLICE, OUTS]: slice `index` of a block of words, which is of this group."""
    offsets = group * OUT_FEATURES + columns
    scales = tl.load(scales_ptr + offsets, mask=columns < OUT_FEATURES, other=0.0).to(tl.float32)
    zeros = tl.load(zeros_ptr + offsets, mask=columns < OUT_FEATURES, other=0).to(tl.int32)
    values = (words >> (4 * index)) & 15
    return (values - zeros[None, :]).to(tl.float32) * scales[None, :]


@triton.jit
def _slice_inputs(inputs_ptr: tl.tensor, places: tl.tensor, IN_FEATURES: tl.constexpr) -> tl.tensor:
    """[SLICE] the input of each place, negative for none."""
    return tl.where(places < IN_FEATURES, places, -1) if inputs_ptr is None else tl.load(inputs_ptr + places)


@triton.jit(do_not_specialize=["num_rows"])
def _int4_linear_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    slice_groups_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    inputs_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """A program has ROWS rows, OUTS outputs, and PART blocks of inputs."""
    columns = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    part = tl.program_id(1)
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    is_row, is_column = (rows < num_rows)[:, None], columns < OUT_FEATURES
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    lines = tl.arange(0, SLICE)
    sums = tl.zeros([ROWS, OUTS], tl.float32)
    first, last = part * PART, tl.minimum(part * PART + PART, NUM_BLOCKS)
    offsets = (first * SLICE + lines).to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
    word_ptrs = words_ptr + offsets
    words = tl.load(word_ptrs, mask=is_column[None, :], other=0)
    for block in range(first, last):
        # The next words are on their way while these are multiplied.
        word_ptrs += SLICE * OUT_FEATURES
        next_words = tl.load(word_ptrs, mask=is_column[None, :] & (block + 1 < last), other=0)
        for index in tl.static_range(SLICES):
            piece = block * SLICES + index
            group = tl.load(slice_groups_ptr + piece).to(tl.int64)
            weight = _slice_weight(words, index, group, scales_ptr, zeros_ptr, columns, OUT_FEATURES)
            inputs = _slice_inputs(inputs_ptr, piece * SLICE + lines, IN_FEATURES)
            x = tl.load(x_rows + inputs[None, :], mask=is_row & (inputs >= 0)[None, :], other=0.0)
            sums = tl.dot(x.to(DOT), weight.to(DOT), sums, input_precision="tf32x3")
        words = next_words
    places = (part * num_rows + rows).to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
    tl.store(sums_ptr + places, sums, mask=is_row & is_column[None, :])


@triton.jit
def _dequantize_int4_kernel(
    words_ptr: tl.tensor,
    slice_groups_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    inputs_ptr: tl.tensor,
    dense_ptr: tl.tensor,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    OUTS: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    columns = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    is_column = columns < OUT_FEATURES
    lines = tl.arange(0, SLICE)
    offsets = (block * SLICE + lines).to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
    words = tl.load(words_ptr + offsets, mask=is_column[None, :], other=0)
    for index in tl.static_range(SLICES):
        piece = block * SLICES + index
        group = tl.load(slice_groups_ptr + piece).to(tl.int64)
        weight = _slice_weight(words, index, group, scales_ptr, zeros_ptr, columns, OUT_FEATURES)
        inputs = _slice_inputs(inputs_ptr, piece * SLICE + lines, IN_FEATURES)
        dense_ptrs = dense_ptr + inputs.to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
        tl.store(dense_ptrs, weight, mask=(inputs >= 0)[:, None] & is_column[None, :])
