"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias. https://arxiv.org/abs/1607.06450"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LayerNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Normalise the last dimension of `x` [..., hidden]; `weight` and `bias` are [hidden]. Returns a new tensor."""
        ...


class AddLayerNorm(Protocol):
    def __call__(self, update: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """residual += update, in place; returns the norm of the new `residual` as a new tensor.

        update, residual: [num_tokens, hidden]. The sum is rounded to the type of `residual` before it is normed.
        """
        ...
