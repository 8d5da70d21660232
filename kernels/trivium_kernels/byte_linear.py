"""Linear layers with weights of one byte, integers or floats: y = x (value * scale)^T + bias.

A scale is of an output, of all, or of an output and a block of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

SCALE_BLOCK = 128  # inputs that can have scales of their own; the last block may be shorter


@dataclass(frozen=True, slots=True)
class ByteWeight:
    """values: int8 or float8_e4m3fn [out_features, in_features]; a float has to be a number.

    scales: float32 [out_features], [1] for all outputs, or [num_blocks, out_features] for blocks of inputs.
    """

    values: Tensor
    scales: Tensor

    @property
    def has_block_scales(self) -> bool:
        return self.scales.dim() == 2

    @property
    def has_one_scale(self) -> bool:
        return self.scales.shape == (1,)


class ByteLinear(Protocol):
    def __call__(self, x: Tensor, weight: ByteWeight, bias: Tensor | None = None) -> Tensor:
        """x [num_rows, in_features] -> [num_rows, out_features] in the type of `x`; bias [out_features]."""
        ...
