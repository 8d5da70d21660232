"""Linear layers with weights of 4-bit integers: y = x ((value - zero) * scale)^T + bias, scales and zeros by group.

Whatever a checkpoint's own packing is, AWQ's along the outputs, GPTQ's along the inputs with its order of activation,
`pack_int4` brings the integers into the one layout that is multiplied: the inputs in slices of 16 that belong to one
group each, and 8 slices in one block of words, so that a word has the same place of 8 slices.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    @property
    def num_bytes(self) -> int:
        parts = (self.words, self.slice_groups, self.scales, self.zeros, self.inputs)
        return sum(part.nbytes for part in parts if part is not None)

    def to(self, device: torch.device) -> Int4Weight:
        return Int4Weight(
            words=self.words.to(device),
            slice_groups=self.slice_groups.to(device),
            scales=self.scales.to(device),
            zeros=self.zeros.to(device),
            inputs=None if self.inputs is None else self.inputs.to(device),
            in_features=self.in_features,
        )


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

    placed = torch.zeros((num_blocks, SLICES, SLICE, out_features), dtype=torch.uint8, device=values.device)
    placed.view(-1, out_features)[places] = values.T[order].to(torch.uint8)
    words = torch.zeros((num_blocks, SLICE, out_features), dtype=torch.int32, device=values.device)
    for index in range(SLICES):  # one by one: a weight in 32 bits would be large
        words |= placed[:, index].int() << (4 * index)
    inputs = torch.full((num_blocks * BLOCK,), -1, dtype=torch.int32, device=values.device)
    inputs[places] = order.int()
    slice_groups = inputs.new_zeros(num_blocks * SLICES)
    slice_groups[:num_slices] = torch.arange(len(counts), device=counts.device).repeat_interleave(slices_of_group).int()
    in_order = bool((inputs[:in_features] == torch.arange(in_features, device=inputs.device)).all())
    return Int4Weight(
        words=words.flatten(0, 1),
        slice_groups=slice_groups,
        scales=scales.T.contiguous(),
        zeros=zeros.T.to(torch.int8).contiguous(),
        inputs=None if in_order else inputs,
        in_features=in_features,
    )


def can_stack_int4(first: Int4Weight, second: Int4Weight) -> bool:
    """Whether their inputs have the same places and groups."""
    return (
        first.in_features == second.in_features
        and len(first.scales) == len(second.scales)
        and _are_same(first.inputs, second.inputs)
        and _are_same(first.slice_groups, second.slice_groups)
    )


def _are_same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and bool((first == second).all())


def stack_int4(weights: Sequence[Int4Weight]) -> Int4Weight:
    """The outputs of all of them, in their order. Any two of them can be stacked."""
    first = weights[0]
    return Int4Weight(
        words=torch.cat([weight.words for weight in weights], dim=1),
        slice_groups=first.slice_groups,
        scales=torch.cat([weight.scales for weight in weights], dim=1),
        zeros=torch.cat([weight.zeros for weight in weights], dim=1),
        inputs=first.inputs,
        in_features=first.in_features,
    )
