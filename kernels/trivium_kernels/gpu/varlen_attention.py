"""`varlen_attention` in Triton: every sequence in tiles of queries, against its own packed keys."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trivium_kernels.gpu.attention import Scores, attend_tiles, tiles_of_rows
from trivium_kernels.varlen_attention import VarlenAttentionPlan


@dataclass(frozen=True, slots=True)
class TritonVarlenPlan(VarlenAttentionPlan):
    """tiles: what `tiles_of_rows` makes, or None for an empty pack."""

    tiles: Tensor | None
    scores: Scores


def plan_varlen_attention(
    cu_seqlens: Tensor, *, causal: bool, bias_table: Tensor | None = None, device: torch.device | None = None
) -> TritonVarlenPlan:
    rows = [(index, start, end - start) for index, (start, end) in enumerate(pairwise(cu_seqlens.tolist()))]
    return TritonVarlenPlan(tiles_of_rows(rows, device or cu_seqlens.device), Scores(causal, None, bias_table))


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, plan: VarlenAttentionPlan, *, scale: float) -> Tensor:
    assert isinstance(plan, TritonVarlenPlan), "the plan is of another device"
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if plan.tiles is not None:
        attend_tiles(query, (key, value), output, plan.tiles, None, scores=plan.scores, scale=scale, soft_cap=None)
    return output
