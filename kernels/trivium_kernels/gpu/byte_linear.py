"""`byte_linear` in Triton: few rows meet bytes that become floats in registers, many a weight that was made before.

A float8 is made a float16 by moving its bits, and so is 256 times too small; no number of it is lost. Every GPU can do
that, and the scale puts it right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.byte_linear import SCALE_BLOCK, ByteWeight
from trivium_kernels.gpu.launch import ceil_div, dot_type
from trivium_kernels.gpu.split_k import MAX_ROWS, OUT_TILE, ROW_TILE, add_parts, new_parts, split

_IN_TILE = SCALE_BLOCK  # so that a step has the scales of one block
_DENSE_TILE = 1024


def byte_linear(x: Tensor, weight: ByteWeight, bias: Tensor | None = None) -> Tensor:
    num_rows, (out_features, in_features) = len(x), weight.values.shape
    values, is_float = _bytes(weight)
    if num_rows > MAX_ROWS:
        return F.linear(x, _dequantized(weight, x.dtype), bias)
    y = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    parts, steps_of_part = split(out_features, ceil_div(in_features, _IN_TILE))
    sums = new_parts(x, parts, out_features)
    _byte_linear_kernel[(ceil_div(out_features, OUT_TILE), parts, ceil_div(num_rows, ROW_TILE))](
        x,
        values,
        weight.scales,
        sums,
        num_rows,
        x.stride(0),
        values.stride(0),
        IN_FEATURES=in_features,
        OUT_FEATURES=out_features,
        ONE_SCALE=weight.has_one_scale,
        BLOCK_SCALES=weight.has_block_scales,
        IS_FLOAT=is_float,
        PART=steps_of_part * _IN_TILE,
        ROWS=ROW_TILE,
        OUTS=OUT_TILE,
        INS=_IN_TILE,
        DOT=dot_type(x),
        num_warps=4,
        num_stages=4,
    )
    add_parts(sums, bias, y)
    return y


def _bytes(weight: ByteWeight) -> tuple[Tensor, bool]:
    """(values as int8, whether they are floats)."""
    if weight.values.dtype == torch.float8_e4m3fn:
        return weight.values.view(torch.int8), True
    assert weight.values.dtype == torch.int8, f"bytes of {weight.values.dtype}"
    return weight.values, False


def _dequantized(weight: ByteWeight, dtype: torch.dtype) -> Tensor:
    values, is_float = _bytes(weight)
    out_features, in_features = values.shape
    dense = torch.empty(values.shape, dtype=dtype, device=values.device)
    _dequantize_bytes_kernel[(out_features, ceil_div(in_features, _DENSE_TILE))](
        values,
        weight.scales,
        dense,
        values.stride(0),
        IN_FEATURES=in_features,
        OUT_FEATURES=out_features,
        ONE_SCALE=weight.has_one_scale,
        BLOCK_SCALES=weight.has_block_scales,
        IS_FLOAT=is_float,
        BLOCK=SCALE_BLOCK,
        TILE=_DENSE_TILE,
        num_warps=4,
    )
    return dense


@triton.jit
def _byte_values(values: tl.tensor, IS_FLOAT: tl.constexpr) -> tl.tensor:
    """What int8 `values` stand for, floats 256 times too small."""
    if IS_FLOAT:
        bits = values.to(tl.int16)  # the sign goes to all upper bits
        result = (((bits & 0x7F) << 7) | (bits & -32768)).to(tl.float16, bitcast=True)
    else:
        result = values
    return result


@triton.jit
def _output_scales(
    scales_ptr: tl.tensor, columns: tl.tensor, OUT_FEATURES: tl.constexpr, ONE_SCALE: tl.constexpr
) -> tl.tensor:
    places = columns * 0 if ONE_SCALE else columns
    return tl.load(scales_ptr + places, mask=columns < OUT_FEATURES, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def _byte_linear_kernel(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    values_stride: tl.tensor,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BLOCK_SCALES: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """A program has ROWS rows, OUTS outputs, and PART inputs."""
    columns = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    part = tl.program_id(1)
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    is_row, is_column = (rows < num_rows)[:, None], columns < OUT_FEATURES
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    value_rows = values_ptr + columns.to(tl.int64)[None, :] * values_stride
    sums = tl.zeros([ROWS, OUTS], tl.float32)
    for start in range(part * PART, tl.minimum(part * PART + PART, IN_FEATURES), INS):
        inputs = start + tl.arange(0, INS)
        is_input = inputs < IN_FEATURES
        values = tl.load(value_rows + inputs[:, None], mask=is_input[:, None] & is_column[None, :], other=0)
        x = tl.load(x_rows + inputs[None, :], mask=is_row & is_input[None, :], other=0.0)
        weight = _byte_values(values, IS_FLOAT).to(DOT)  # [INS, OUTS]
        if BLOCK_SCALES:
            block_sums = tl.dot(x.to(DOT), weight, input_precision="tf32x3")
            scales = _output_scales(scales_ptr + start // INS * OUT_FEATURES, columns, OUT_FEATURES, ONE_SCALE)
            sums += block_sums * scales[None, :]
        else:
            sums = tl.dot(x.to(DOT), weight, sums, input_precision="tf32x3")
    if not BLOCK_SCALES:
        sums *= _output_scales(scales_ptr, columns, OUT_FEATURES, ONE_SCALE)[None, :]
    if IS_FLOAT:
        sums *= 256.0
    places = (part * num_rows + rows).to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
    tl.store(sums_ptr + places, sums, mask=is_row & is_column[None, :])


@triton.jit
def _dequantize_bytes_kernel(
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    dense_ptr: tl.tensor,
    values_stride: tl.tensor,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BLOCK_SCALES: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    inputs = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = inputs < IN_FEATURES
    if BLOCK_SCALES:
        scale = tl.load(scales_ptr + inputs // BLOCK * OUT_FEATURES + row, mask=mask, other=0.0)
    else:
        scale = tl.load(scales_ptr + (0 if ONE_SCALE else row))
    if IS_FLOAT:
        scale *= 256.0
    values = tl.load(values_ptr + row * values_stride + inputs, mask=mask, other=0)
    tl.store(dense_ptr + row * IN_FEATURES + inputs, _byte_values(values, IS_FLOAT).to(tl.float32) * scale, mask=mask)
