"""Linear layers over packed rows. The one place where a faster matrix product can be put behind the same call."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x weight^T + bias. weight: [out_features, in_features], bias: [out_features] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_rows, in_features] -> [num_rows, out_features]."""
        return F.linear(x, self.weight, self.bias)
