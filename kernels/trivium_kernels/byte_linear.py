"""Linear layers with weights of one byte, integers or floats: y = (x values^T) * scale + bias, a scale per output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ByteWeight:
    """values: int8 or float8_e4m3fn [out_features, in_features]; a float has to be a number.

    scales: float32 [out_features], or [1] for all outputs.
    """

    values: Tensor
    scales: Tensor


class ByteLinear(Protocol):
    def __call__(self, x: Tensor, weight: ByteWeight, bias: Tensor | None = None) -> Tensor:
        """x [num_rows, in_features] -> [num_rows, out_features] in the type of `x`; bias [out_features]."""
        ...
