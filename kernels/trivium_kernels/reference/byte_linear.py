"""`byte_linear` in plain torch, by way of the whole weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trivium_kernels.byte_linear import SCALE_BLOCK, ByteWeight


def byte_linear(x: Tensor, weight: ByteWeight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, dequantized(weight).to(x.dtype), bias)


def dequantized(weight: ByteWeight) -> Tensor:
    """[out_features, in_features] in float32."""
    scales = weight.scales[:, None]
    if weight.has_block_scales:
        scales = weight.scales.repeat_interleave(SCALE_BLOCK, 0)[: weight.values.shape[1]].T
    return weight.values.float() * scales
