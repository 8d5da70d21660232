"""`activation` in Triton: one read and one write per element, arithmetic in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.activation import Activation
from trivium_kernels.gpu.launch import ceil_div

_TILE = 1024
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_GELU_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_MISH_LINEAR = tl.constexpr(20.0)  # from here on mish(x) is x in float32, and exp(x)^2 would overflow before long


def activate(x: Tensor, kind: Activation) -> Tensor:
    if kind is Activation.LINEAR or x.numel() == 0:
        return x
    y = x if x.is_contiguous() else x.contiguous()
    _activate_kernel[(ceil_div(y.numel(), _TILE),)](y, y.numel(), KIND=kind.value, TILE=_TILE, num_warps=4)
    return y


def gated_activate(gate_up: Tensor, kind: Activation) -> Tensor:
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        _gated_activate_kernel[(num_rows, ceil_div(width, _TILE))](
            gate_up, y, gate_up.stride(0), WIDTH=width, KIND=kind.value, TILE=_TILE, num_warps=4
        )
    return y


@triton.jit(do_not_specialize=["numel"])
def _activate_kernel(x_ptr: tl.tensor, numel: tl.tensor, KIND: tl.constexpr, TILE: tl.constexpr) -> None:
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = places < numel
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + places, _activated(x, KIND), mask=mask)


@triton.jit
def _gated_activate_kernel(
    x_ptr: tl.tensor, y_ptr: tl.tensor, x_stride: tl.tensor, WIDTH: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr
) -> None:
    """y = activation(x[:width]) * x[width:] of each row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < WIDTH
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + columns, _activated(gate, KIND) * up, mask=mask)


@triton.jit
def _activated(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == "relu":
        y = tl.maximum(x, 0.0)
    elif KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif KIND == "gelu_tanh":
        y = x * tl.sigmoid((x + 0.044715 * x * x * x) * _GELU_SCALE)  # (1 + tanh(z)) / 2 = sigmoid(2 z)
    elif KIND == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif KIND == "relu2":
        y = tl.maximum(x, 0.0)
        y = y * y
    elif KIND == "relu6":
        y = tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif KIND == "leaky_relu":
        y = tl.where(x > 0, x, 0.01 * x)
    elif KIND == "hardswish":
        y = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    elif KIND == "mish":
        # tanh(log(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2)
        e = tl.exp(tl.minimum(x, _MISH_LINEAR))
        square = e * (e + 2.0)
        y = x * (square / (square + 2.0))
    elif KIND == "tanh":
        y = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif KIND == "sigmoid":
        y = tl.sigmoid(x)
    else:
        tl.static_assert(KIND == "linear", "no such activation")
        y = x
    return y
