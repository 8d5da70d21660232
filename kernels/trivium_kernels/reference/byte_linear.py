"""`byte_linear` in plain torch, by way of the whole weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trivium_kernels.byte_linear import ByteWeight


def byte_linear(x: Tensor, weight: ByteWeight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, (weight.values.float() * weight.scales[:, None]).to(x.dtype), bias)
