"""A step of 16 requests, and of one, with 4 beams each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_kernels.case import Case, Inputs, num_bytes
from trivium_kernels.dispatch import Kernels
from trivium_kernels.select_beams import BeamRows


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    for num_groups, width, vocab_size in ((16, 4, 58101), (1, 4, 58101)) if full else ((2, 3, 2100),):
        yield _case(kernels, inputs, num_groups, width, vocab_size)


def _case(kernels: Kernels, inputs: Inputs, num_groups: int, width: int, vocab_size: int) -> Case:
    num_rows, candidates = num_groups * width, 2 * width
    logits = 3 * inputs.normal(num_rows, vocab_size, dtype=torch.float32)
    beams = BeamRows(
        rows=torch.arange(num_rows, device=inputs.device).view(num_groups, width),
        scores=-inputs.normal(num_groups, width, dtype=torch.float32).abs(),
        num_candidates=torch.full((num_groups,), candidates, device=inputs.device),
        end_token_ids=inputs.below(vocab_size, num_groups, 1),
        all_end=torch.zeros(num_groups, dtype=torch.bool, device=inputs.device),
    )
    return Case(
        f"{num_groups} x {width} beams, {vocab_size} tokens",
        lambda: kernels.select_beams(logits, beams, max_candidates=candidates, normalize=True).scores,
        lambda: _by_softmax(logits.double(), beams.scores.double(), candidates),
        num_bytes(logits),
        lambda: _by_softmax(logits, beams.scores, candidates),
        tolerance=1e-5,
    )


def _by_softmax(logits: Tensor, scores: Tensor, num_candidates: int) -> Tensor:
    sums = logits.log_softmax(dim=-1).view(*scores.shape, -1) + scores[:, :, None]
    return sums.flatten(1).topk(num_candidates, dim=-1).values
