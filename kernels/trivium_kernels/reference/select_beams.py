"""`select_beams` in plain torch, group by group."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium_kernels.select_beams import BeamRows, BeamSelection

_NOWHERE = -1e9


def select_beams(logits: Tensor, beams: BeamRows, *, max_candidates: int, normalize: bool) -> BeamSelection:
    num_groups, max_width = beams.rows.shape
    logprobs = torch.log_softmax(logits.float(), dim=-1) if normalize else logits.float()
    device = logits.device
    found = BeamSelection(
        scores=torch.full((num_groups, max_candidates), -torch.inf, device=device),
        beams=torch.zeros((num_groups, max_candidates), dtype=torch.int64, device=device),
        token_ids=torch.zeros((num_groups, max_candidates), dtype=torch.int64, device=device),
        parents=torch.arange(max_width, device=device).repeat(num_groups, 1),
        next_token_ids=torch.zeros((num_groups, max_width), dtype=torch.int64, device=device),
        next_scores=torch.full((num_groups, max_width), -torch.inf, dtype=torch.float64, device=device),
    )
    for group in range(num_groups):
        rows = beams.rows[group][beams.rows[group] >= 0]
        if len(rows):
            _select_group(found, beams, group, logprobs[rows])
    return found


def _select_group(found: BeamSelection, beams: BeamRows, group: int, logprobs: Tensor) -> None:
    """logprobs: [width, vocab_size]."""
    width, vocab_size = logprobs.shape
    values, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    sums = values + beams.scores[group, :width, None].float()
    values, order = sums.flatten().sort(descending=True, stable=True)
    count = min(int(beams.num_candidates[group]), len(values))
    values, order = values[:count], order[:count]
    token_ids, parents = ids.flatten()[order], order // vocab_size
    found.scores[group, :count], found.token_ids[group, :count], found.beams[group, :count] = values, token_ids, parents
    ends = torch.isin(token_ids, beams.end_token_ids[group]) | beams.all_end[group]
    running, best = (values.double() + torch.where(ends, _NOWHERE, 0.0)).sort(descending=True, stable=True)
    best, width = best[:width], min(width, count)
    found.next_scores[group, :width] = running[:width]
    found.next_token_ids[group, :width], found.parents[group, :width] = token_ids[best], parents[best]
