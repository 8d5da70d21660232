"""`activation` in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium_kernels.activation import Activation


def activate(x: Tensor, kind: Activation) -> Tensor:
    match kind:
        case Activation.RELU:
            return x.relu_()
        case Activation.SILU:
            return F.silu(x, inplace=True)
        case Activation.GELU:
            return F.gelu(x)
        case Activation.GELU_TANH:
            return F.gelu(x, approximate="tanh")
        case Activation.QUICK_GELU:
            return x.mul_(torch.sigmoid(1.702 * x))
        case Activation.RELU2:
            return x.relu_().square_()
        case Activation.RELU6:
            return x.clamp_(0, 6)
        case Activation.LEAKY_RELU:
            return F.leaky_relu(x, inplace=True)
        case Activation.HARDSWISH:
            return F.hardswish(x, inplace=True)
        case Activation.MISH:
            return F.mish(x, inplace=True)
        case Activation.TANH:
            return x.tanh_()
        case Activation.SIGMOID:
            return x.sigmoid_()
        case Activation.LINEAR:
            return x


def gated_activate(gate_up: Tensor, kind: Activation) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, kind).mul_(up)
