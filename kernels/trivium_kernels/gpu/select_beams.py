"""`select_beams` in Triton: the best tokens of every row, then one program for each group of beams."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import power_of_two
from trivium_kernels.gpu.top_tokens import MAX_TOP, top_tokens
from trivium_kernels.select_beams import BeamRows, BeamSelection

_NOWHERE = tl.constexpr(-1e9)


def select_beams(logits: Tensor, beams: BeamRows, *, max_candidates: int, normalize: bool) -> BeamSelection:
    num_groups, max_width = beams.rows.shape
    values, token_ids = _best_of_rows(logits, max_candidates, normalize)
    device = logits.device
    found = BeamSelection(
        scores=torch.empty((num_groups, max_candidates), dtype=torch.float32, device=device),
        beams=torch.empty((num_groups, max_candidates), dtype=torch.int64, device=device),
        token_ids=torch.empty((num_groups, max_candidates), dtype=torch.int64, device=device),
        parents=torch.empty((num_groups, max_width), dtype=torch.int64, device=device),
        next_token_ids=torch.empty((num_groups, max_width), dtype=torch.int64, device=device),
        next_scores=torch.empty((num_groups, max_width), dtype=torch.float64, device=device),
    )
    sums = power_of_two(max(max_width * values.shape[1], 2))
    if num_groups:
        _select_beams_kernel[(num_groups,)](
            values,
            token_ids,
            beams.rows,
            beams.scores,
            beams.num_candidates,
            beams.end_token_ids,
            beams.all_end,
            found.scores,
            found.beams,
            found.token_ids,
            found.parents,
            found.next_token_ids,
            found.next_scores,
            VOCAB_SIZE=logits.shape[1],
            NUM_TOP=values.shape[1],
            MAX_WIDTH=max_width,
            MAX_CANDIDATES=max_candidates,
            MAX_ENDS=beams.end_token_ids.shape[1],
            SUMS=sums,
            CANDIDATES=power_of_two(max(max_candidates, 2)),
            num_warps=4 if sums <= 4096 else 16,
        )
    return found


def _best_of_rows(logits: Tensor, num_top: int, normalize: bool) -> tuple[Tensor, Tensor]:
    if num_top <= MAX_TOP:
        found = top_tokens(logits, num_top, normalize=normalize)
        return found.values, found.token_ids
    scores = torch.log_softmax(logits.float(), dim=-1) if normalize else logits.float()
    values, token_ids = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :num_top].contiguous(), token_ids[:, :num_top].contiguous()


@triton.jit
def _select_beams_kernel(
    values_ptr: tl.tensor,
    top_ids_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    beam_scores_ptr: tl.tensor,
    num_candidates_ptr: tl.tensor,
    end_token_ids_ptr: tl.tensor,
    all_end_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    beams_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    parents_ptr: tl.tensor,
    next_token_ids_ptr: tl.tensor,
    next_scores_ptr: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    NUM_TOP: tl.constexpr,
    MAX_WIDTH: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    MAX_ENDS: tl.constexpr,
    SUMS: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> None:
    group = tl.program_id(0).to(tl.int64)
    # The sums of all beams of the group, in the order that decides between equal ones; empty places are no numbers, so
    # that no comparison finds them.
    places = tl.arange(0, SUMS)
    beams = places // NUM_TOP
    rows = tl.load(rows_ptr + group * MAX_WIDTH + beams, mask=beams < MAX_WIDTH, other=-1)
    ids = tl.load(top_ids_ptr + rows * NUM_TOP + places % NUM_TOP, mask=rows >= 0, other=VOCAB_SIZE)
    values = tl.load(values_ptr + rows * NUM_TOP + places % NUM_TOP, mask=rows >= 0, other=0.0)
    beam_scores = tl.load(beam_scores_ptr + group * MAX_WIDTH + beams, mask=rows >= 0, other=0.0).to(tl.float32)
    sums = tl.where(ids < VOCAB_SIZE, values + beam_scores, float("nan"))
    width = tl.sum(((rows >= 0) & (places % NUM_TOP == 0)).to(tl.int32), axis=0)

    candidates = tl.arange(0, CANDIDATES)
    scores = tl.full([CANDIDATES], float("-inf"), tl.float32)
    chosen_beams = tl.zeros([CANDIDATES], tl.int32)
    token_ids = tl.zeros([CANDIDATES], tl.int64)
    is_candidate = tl.zeros([CANDIDATES], tl.int32)
    best = tl.full([], float("inf"), tl.float32)
    place = tl.full([], -1, tl.int32)
    for index in range(tl.load(num_candidates_ptr + group).to(tl.int32)):
        is_left = (sums < best) | ((sums == best) & (places > place))
        best = tl.max(tl.where(is_left, sums, float("-inf")), axis=0)
        place = tl.min(tl.where(is_left & (sums == best), places, SUMS), axis=0)
        if place < SUMS:
            beam = place // NUM_TOP
            row = tl.load(rows_ptr + group * MAX_WIDTH + beam)
            is_place = candidates == index
            scores = tl.where(is_place, best, scores)
            chosen_beams = tl.where(is_place, beam, chosen_beams)
            token_ids = tl.where(is_place, tl.load(top_ids_ptr + row * NUM_TOP + place % NUM_TOP), token_ids)
            is_candidate = tl.where(is_place, 1, is_candidate)
    mask = candidates < MAX_CANDIDATES
    outputs = group * MAX_CANDIDATES + candidates
    tl.store(scores_ptr + outputs, scores, mask=mask)
    tl.store(beams_ptr + outputs, chosen_beams.to(tl.int64), mask=mask)
    tl.store(token_ids_ptr + outputs, token_ids, mask=mask)

    # Sums of doubles, as beam search on the host has them: 1e9 leaves nothing of a float32.
    ends = tl.zeros([CANDIDATES], tl.int32) + tl.load(all_end_ptr + group).to(tl.int32)
    for index in range(MAX_ENDS):
        end = tl.load(end_token_ids_ptr + group * MAX_ENDS + index)
        ends = tl.where(token_ids == end, 1, ends)
    running = scores.to(tl.float64) + tl.where(ends > 0, _NOWHERE, 0.0).to(tl.float64)
    is_left = is_candidate > 0
    for index in range(MAX_WIDTH):
        score = tl.max(tl.where(is_left, running, float("-inf")), axis=0)
        chosen = tl.min(tl.where(is_left & (running == score), candidates, CANDIDATES), axis=0)
        is_found = (index < width) & (chosen < CANDIDATES)
        parent = tl.sum(tl.where(candidates == chosen, chosen_beams, 0), axis=0)
        token = tl.sum(tl.where(candidates == chosen, token_ids, 0), axis=0)
        output = group * MAX_WIDTH + index
        tl.store(parents_ptr + output, tl.where(is_found, parent, index).to(tl.int64))
        tl.store(next_token_ids_ptr + output, tl.where(is_found, token, 0))
        tl.store(next_scores_ptr + output, tl.where(is_found, score, float("-inf")))
        is_left = is_left & (candidates != chosen)
