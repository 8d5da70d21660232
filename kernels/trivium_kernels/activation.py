"""Activations of a feed-forward block, plain and gated (GLU, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from torch import Tensor


class Activation(StrEnum):
    """The names are torch's, except: quick_gelu(x) = x * sigmoid(1.702 x), relu2(x) = relu(x)^2, linear(x) = x.

    gelu is exact, with the error function; gelu_tanh is its approximation by tanh; leaky_relu has slope 0.01 below 0.
    """

    RELU = "relu"
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    QUICK_GELU = "quick_gelu"
    RELU2 = "relu2"
    RELU6 = "relu6"
    LEAKY_RELU = "leaky_relu"
    HARDSWISH = "hardswish"
    MISH = "mish"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    LINEAR = "linear"


class Activate(Protocol):
    def __call__(self, x: Tensor, kind: Activation) -> Tensor:
        """Apply `kind` to each element of `x`. May overwrite and return `x`."""
        ...


class GatedActivate(Protocol):
    def __call__(self, gate_up: Tensor, kind: Activation) -> Tensor:
        """activation(gate) * up for `gate_up` [num_tokens, 2 * width], gate first. Returns [num_tokens, width]."""
        ...
