"""`layer_norm` in Triton. A program norms whole rows in registers, in float32: one read and one write per element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import as_rows, ceil_div, row_tile


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, bias, eps, y)
    return y


def add_layer_norm(update: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    y = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    _launch(update, residual, weight, bias, eps, y)
    return y


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, y: Tensor) -> None:
    num_rows = x.numel() // x.shape[-1]
    if num_rows == 0:
        return
    rows = as_rows(x)
    tile = row_tile(x.shape[-1])
    _layer_norm_kernel[(ceil_div(num_rows, tile.rows),)](
        rows.data,
        residual,
        weight,
        bias,
        y,
        num_rows,
        rows.per_outer,
        rows.outer_stride,
        rows.inner_stride,
        0 if residual is None else residual.stride(0),
        eps,
        WIDTH=x.shape[-1],
        TILE=tile.width,
        ROWS=tile.rows,
        num_warps=tile.num_warps,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_rows: tl.tensor,
    rows_per_outer: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """y = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias, r being x, or the residual after x was added to it."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, TILE)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    starts = rows // rows_per_outer * outer_stride + rows % rows_per_outer * inner_stride
    x = tl.load(x_ptr + starts[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows[:, None] * residual_stride + columns[None, :]
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptrs, rounded, mask=mask)
        x = rounded.to(tl.float32)
    centred = tl.where(mask, x - (tl.sum(x, axis=1) / WIDTH)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    y = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + rows[:, None] * WIDTH + columns[None, :], y, mask=mask)
