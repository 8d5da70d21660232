"""Linear layers with weights of 4-bit integers: y = x ((value - zero) * scale)^T + bias, scales and zeros by group.

Whatever a checkpoint's own packing is, AWQ's along the outputs, GPTQ's along the inputs with its order of activation,
`pack_int4` brings the integers into the one layout that is multiplied: the inputs in slices of 16 that belong to one
group each, and 8 slices in one block of words, so that a word has the same place of 8 slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SLICE = 16  # inputs that are multiplied at once
SLICES = 8  # in a block: as many 4-bit values as a word has
BLOCK = SLICE * SLICES


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight [out_features, in_features].

    words: int32 [num_blocks * 16, out_features], place i of slice j of block b is in bits [4 j, 4 j + 4) of word
    16 b + i. slice_groups: int32 [num_blocks * 8]. scales: float [num_groups, out_features]; zeros: int8, the same.
    inputs: int32 [num_blocks * 128], the input that each place has, -1 for none; None if place i has input i.
    """

    words: Tensor
    slice_groups: Tensor
    scales: Tensor
    zeros: Tensor
    inputs: Tensor | None
    in_features: int

    @property
    def out_features(self) -> int:
        return self.words.shape[1]


class Int4Linear(Protocol):
    def __call__(self, x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
        """x [num_rows, in_features] -> [num_rows, out_features] in the type of `x`; bias [out_features]."""
        ...


def pack_int4(values: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Int4Weight:
    """values [out_features, in_features] from 0 to 15; zeros, scales [out_features, num_groups]; groups [in_features].

    Inputs of a group need not lie side by side.
    """
    out_features, in_features = values.shape
    order = groups.argsort(stable=True)
    counts = torch.bincount(groups, minlength=scales.shape[1])
    slices_of_group = -(-counts // SLICE)
    first_place = (slices_of_group.cumsum(0) - slices_of_group) * SLICE
    first_input = counts.cumsum(0) - counts
    sorted_groups = groups[order]
    rank = torch.arange(in_features, device=groups.device) - first_input[sorted_groups]
    places = first_place[sorted_groups] + rank
    num_slices = int(slices_of_group.sum())
    num_blocks = -(-num_slices // SLICES)

    placed = values.new_zeros((num_blocks * BLOCK, out_features), dtype=torch.int64)
    placed[places] = values.T[order].long()
    inputs = torch.full((num_blocks * BLOCK,), -1, dtype=torch.int32, device=values.device)
    inputs[places] = order.int()
    slice_groups = inputs.new_zeros(num_blocks * SLICES)
    slice_groups[:num_slices] = torch.arange(len(counts), device=counts.device).repeat_interleave(slices_of_group).int()
    shifts = 4 * torch.arange(SLICES, device=values.device)[:, None, None]
    words = (placed.view(num_blocks, SLICES, SLICE, out_features) << shifts).sum(1)  # [num_blocks, SLICE, out_features]
    words = torch.where(words >= 2**31, words - 2**32, words)
    in_order = bool((inputs[:in_features] == torch.arange(in_features, device=inputs.device)).all())
    return Int4Weight(
        words=words.int().flatten(0, 1).contiguous(),
        slice_groups=slice_groups,
        scales=scales.T.contiguous(),
        zeros=zeros.T.to(torch.int8).contiguous(),
        inputs=None if in_order else inputs,
        in_features=in_features,
    )
