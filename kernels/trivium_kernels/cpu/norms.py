"""`rms_norm` and `layer_norm` in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium_kernels import reference
from trivium_kernels.cpu import _native
from trivium_kernels.cpu.addresses import bits, rows_of
from trivium_kernels.cpu.memory import empty


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype is not torch.float32:
        return reference.rms_norm(x, weight, eps)
    return _norm(x, weight, None, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype is not torch.float32:
        return reference.layer_norm(x, weight, bias, eps)
    return _norm(x, weight, bias, eps)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x = rows_of(x)
    width = x.shape[-1]
    if x.dim() == 2:
        rows, inner, outer_stride, inner_stride = x.shape[0], 1, x.stride(0), 0
    elif x.dim() == 3:
        rows, inner, outer_stride, inner_stride = x.shape[0] * x.shape[1], x.shape[1], x.stride(0), x.stride(1)
    else:
        x = x.contiguous()
        rows, inner, outer_stride, inner_stride = x.numel() // max(1, width), 1, width, 0
    y = empty(x.shape)
    _native.norm(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        bits(eps),
        rows,
        max(1, inner),
        outer_stride,
        inner_stride,
        width,
    )
    return y
