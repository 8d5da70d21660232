"""select_beams against the beam search of the engine itself, over steps of random groups."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from kernel_checks import randn
from trivium.beam_search import BeamSearch
from trivium.params import BeamSettings, SamplingParams
from trivium.step import BeamCandidates
from trivium_kernels.dispatch import Kernels
from trivium_kernels.select_beams import BeamRows

ENDS = (2, 5)
MAX_WIDTH, MAX_CANDIDATES, MAX_TOKENS = 5, 15, 5


def make_search(width: int, min_tokens: int) -> BeamSearch:
    params = SamplingParams(min_tokens=min_tokens)
    return BeamSearch(BeamSettings(width=width, early_stopping="never"), params, MAX_TOKENS, ENDS)


def candidates_of(search: BeamSearch, logprobs: Tensor) -> BeamCandidates:
    """As the executor finds them; logprobs [width, vocab_size] float32."""
    values, token_ids = logprobs.sort(dim=-1, descending=True, stable=True)
    sums = values.numpy() + np.array(search.scores, np.float32)[:, None]
    order = np.argsort(-sums, axis=None, kind="stable")[: search.num_candidates]
    return BeamCandidates(
        slot=0,
        scores=tuple(sums.reshape(-1)[order].tolist()),
        beams=tuple((order // sums.shape[1]).tolist()),
        token_ids=tuple(token_ids.numpy().reshape(-1)[order].tolist()),
    )


def beam_rows(searches: list[BeamSearch], rows: list[list[int]], min_tokens: list[int]) -> BeamRows:
    padded = [group + [-1] * (MAX_WIDTH - len(group)) for group in rows]
    scores = [search.scores + [0.0] * (MAX_WIDTH - search.width) for search in searches]
    lengths = [search.num_tokens + 1 for search in searches]
    ends = [ENDS if length >= least else (-1, -1) for length, least in zip(lengths, min_tokens, strict=True)]
    last = [length >= MAX_TOKENS for length in lengths]
    return BeamRows(
        torch.tensor(padded),
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor([search.num_candidates for search in searches]),
        torch.tensor(ends),
        torch.tensor(last),
    )


@pytest.mark.parametrize("vocab_size", [3, 9, 40])
def test_every_step_is_that_of_the_engine(kernels: Kernels, vocab_size: int) -> None:
    """Whole log-probabilities make equal sums everywhere, some are impossible; the prompt's row is shared at first."""
    numbers = random.Random(vocab_size)
    widths = [5, 1, 2]
    min_tokens = [numbers.choice((0, 3)) for _ in widths]
    searches = [make_search(width, least) for width, least in zip(widths, min_tokens, strict=True)]
    for step in range(MAX_TOKENS):
        num_rows = len(searches) if step == 0 else sum(widths)
        starts = np.cumsum([0, *widths])
        rows = [[g] * w if step == 0 else list(range(starts[g], starts[g] + w)) for g, w in enumerate(widths)]
        logprobs = -(3 * randn(num_rows, vocab_size, seed=step)).abs().round()
        logprobs[randn(num_rows, vocab_size, seed=step + 9) > 1.5] = -torch.inf
        beams = beam_rows(searches, rows, min_tokens)
        found = kernels.select_beams(logprobs, beams, max_candidates=MAX_CANDIDATES, normalize=False)
        for group, search in enumerate(searches):
            expected = candidates_of(search, logprobs[rows[group]])
            count = len(expected.scores)
            assert found.scores[group, :count].tolist() == list(expected.scores)
            assert found.beams[group, :count].tolist() == list(expected.beams)
            assert found.token_ids[group, :count].tolist() == list(expected.token_ids)
            assert (found.scores[group, count:] == -torch.inf).all()
            parents = search.advance(expected)
            going_on = min(search.width, count)
            assert found.parents[group, :going_on].tolist() == list(parents)
            assert found.next_token_ids[group, :going_on].tolist() == [tail.token_id for tail in search.tails]
            assert found.next_scores[group, :going_on].tolist() == search.scores
            assert found.parents[group, going_on:].tolist() == list(range(going_on, MAX_WIDTH))


def test_logits_become_log_probabilities(kernels: Kernels) -> None:
    logits = 4 * randn(3, 2500) - 7
    beams = BeamRows(
        torch.tensor([[2, 0, 1]]),
        torch.tensor([[-1.5, -2.0, -2.25]]),
        torch.tensor([6]),
        torch.tensor([[int(logits[2].argmax())]]),
        torch.tensor([False]),
    )
    found = kernels.select_beams(logits, beams, max_candidates=8, normalize=True)
    sums = logits.double().log_softmax(-1)[[2, 0, 1]] + torch.tensor([[-1.5], [-2.0], [-2.25]])
    values, order = sums.flatten().sort(descending=True)
    torch.testing.assert_close(found.scores[0, :6], values[:6].float(), atol=2e-6, rtol=1e-6)
    assert found.beams[0, :6].tolist() == (order[:6] // 2500).tolist()
    assert found.token_ids[0, :6].tolist() == (order[:6] % 2500).tolist()
    ended = (order[:6] // 2500 == 0) & (order[:6] % 2500 == logits[2].argmax())
    assert found.parents[0].tolist() == (order[:6] // 2500)[~ended][:3].tolist()
    assert found.next_token_ids[0].tolist() == (order[:6] % 2500)[~ended][:3].tolist()
