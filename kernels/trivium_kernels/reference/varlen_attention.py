"""`varlen_attention` in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trivium_kernels.reference.attention import attend, mask_of_reversed_queries
from trivium_kernels.varlen_attention import VarlenAttentionPlan


@dataclass(frozen=True, slots=True)
class VarlenSequence:
    """Tokens [start, end) of the pack. mask: additive [num_heads or 1, length, length], last query first, or None."""

    start: int
    end: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class TorchVarlenPlan(VarlenAttentionPlan):
    sequences: tuple[VarlenSequence, ...]
    causal: bool


def plan_varlen_attention(
    cu_seqlens: Tensor, *, causal: bool, bias_table: Tensor | None = None, device: torch.device | None = None
) -> TorchVarlenPlan:
    bounds = cu_seqlens.tolist()
    sequences = []
    for start, end in pairwise(bounds):
        mask = None
        if start < end and bias_table is not None:
            mask = mask_of_reversed_queries(end - start, end - start, causal=causal, window=None, bias_table=bias_table)
        sequences.append(VarlenSequence(start, end, mask))
    return TorchVarlenPlan(tuple(sequences), causal)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, plan: VarlenAttentionPlan, *, scale: float) -> Tensor:
    assert isinstance(plan, TorchVarlenPlan), "the plan is of another device"
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for sequence in plan.sequences:
        rows = slice(sequence.start, sequence.end)
        is_causal = plan.causal and sequence.mask is None
        output[rows] = attend(query[rows], key[rows], value[rows], sequence.mask, is_causal, scale)
    return output
