"""`activate` and `gated_activate` in C++, for the activations that models mostly have."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium_kernels import reference
from trivium_kernels.activation import Activation
from trivium_kernels.cpu import _native
from trivium_kernels.cpu.addresses import rows_of
from trivium_kernels.cpu.memory import empty

_KINDS = {Activation.RELU: 0, Activation.SILU: 1, Activation.GELU_TANH: 2, Activation.GELU: 3}


def activate(x: Tensor, kind: Activation) -> Tensor:
    number = _KINDS.get(kind)
    if number is None or x.dtype is not torch.float32 or x.dim() != 2 or not x.is_contiguous():
        return reference.activate(x, kind)
    _native.activate(x.data_ptr(), x.data_ptr(), x.shape[0], x.shape[1], x.shape[1], number, False)
    return x


def gated_activate(gate_up: Tensor, kind: Activation) -> Tensor:
    number = _KINDS.get(kind)
    if number is None or gate_up.dtype is not torch.float32:
        return reference.gated_activate(gate_up, kind)
    gate_up = rows_of(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = empty((num_rows, width))
    _native.activate(gate_up.data_ptr(), y.data_ptr(), num_rows, width, gate_up.stride(0), number, True)
    return y
