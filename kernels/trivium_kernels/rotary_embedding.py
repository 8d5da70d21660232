"""Rotary position embedding in the two-halves layout. https://arxiv.org/abs/2104.09864

y[:half] = x[:half] * cos - x[half:] * sin
y[half:] = x[half:] * cos + x[:half] * sin

over the first `rotary_dim` elements of a head; those after them are left as they are.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RotaryEmbedding(Protocol):
    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate every head of `x` [num_tokens, num_heads, head_dim] by its token's angle.

        `cos` is [num_tokens, 1, rotary_dim], the angles' cosines twice; `sin` has the same shape and carries the signs:
        minus the sines in its first half, the sines in its second. Returns a new tensor like `x`.
        """
        ...
