"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias. https://arxiv.org/abs/1607.06450"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LayerNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Normalise the last dimension of `x` [..., hidden]; `weight` and `bias` are [hidden]. Returns a new tensor."""
        ...
