"""`int4_linear` in plain torch, by way of the whole weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium_kernels.int4_linear import SLICE, SLICES, Int4Weight


def int4_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, dequantized(weight).to(x.dtype), bias)


def dequantized(weight: Int4Weight) -> Tensor:
    """[out_features, in_features] in float32."""
    device = weight.words.device
    shifts = 4 * torch.arange(SLICES, dtype=torch.int32, device=device)[:, None, None]
    words = weight.words.view(-1, 1, SLICE, weight.out_features)
    values = ((words >> shifts) & 15).flatten(0, 2)  # [places, out_features]
    groups = weight.slice_groups.long().repeat_interleave(SLICE)
    placed = (values - weight.zeros[groups]).float() * weight.scales[groups].float()
    if weight.inputs is None:
        return placed[: weight.in_features].T
    is_used = weight.inputs >= 0
    dense = torch.zeros((weight.in_features, weight.out_features), device=device)
    return dense.index_copy_(0, weight.inputs[is_used].long(), placed[is_used]).T
