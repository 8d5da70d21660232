"""Linear layers over packed rows. The one place where a faster matrix product can be put behind the same call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Delta(Protocol):
    """What the adapters of a step's rows add to a layer."""

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Change y [num_rows, out_features], which the layer has made of x [num_rows, in_features], in place."""
        ...


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x weight^T + bias. weight: [out_features, in_features], bias: [out_features] or None.

    delta: only where adapters can be loaded.
    """

    weight: Tensor
    bias: Tensor | None = None
    delta: Delta | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_rows, in_features] -> [num_rows, out_features]."""
        y = F.linear(x, self.weight, self.bias)
        if self.delta is not None:
            self.delta.add_to(y, x)
        return y
