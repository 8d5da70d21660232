"""Activations of a feed-forward block, plain and gated (GLU, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from torch import Tensor


class Activation(StrEnum):
    """relu; silu(x) = x * sigmoid(x); gelu with the error function; gelu_tanh with its tanh approximation."""

    RELU = "relu"
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


class Activate(Protocol):
    def __call__(self, x: Tensor, kind: Activation) -> Tensor:
        """Apply `kind` to each element of `x`. May overwrite and return `x`."""
        ...


class GatedActivate(Protocol):
    def __call__(self, gate_up: Tensor, kind: Activation) -> Tensor:
        """activation(gate) * up for `gate_up` [num_tokens, 2 * width], gate first. Returns [num_tokens, width]."""
        ...
