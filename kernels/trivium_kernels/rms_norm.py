"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight. https://arxiv.org/abs/1910.07467"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise the last dimension of `x` [..., hidden] by `weight` [hidden]. Returns a new tensor like `x`."""
        ...


class AddRmsNorm(Protocol):
    def __call__(self, update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += update, in place; returns the norm of the new `residual` as a new tensor.

        update, residual: [num_tokens, hidden]. The sum is rounded to the type of `residual` before it is normed.
        """
        ...
