"""Filters of the random choice: as transformers where it has them, as their definitions say where it has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from trivium.executor.truncation import truncate, without_top_choices
from trivium.params import SamplingParams
from unit.executor.test_sampler import VOCAB_SIZE, draws, random_logits

# Flat, steep and in between: every filter has rows in which it leaves out much and rows in which it leaves out little.
SCORES = torch.cat([random_logits(4, seed=1) * scale for scale in (0.1, 1.0, 3.0)])


def kept(params: dict[str, Any], scores: Tensor = SCORES) -> Tensor:
    scores = scores.clone()
    truncate(scores, [SamplingParams(**params)] * len(scores))
    return scores.isfinite()


def kept_by(*warpers: hf.LogitsProcessor, scores: Tensor = SCORES) -> Tensor:
    for warper in warpers:
        scores = warper(torch.zeros((len(scores), 1), dtype=torch.int64), scores)
    return scores.isfinite()


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"typical_p": 0.9}, [hf.TypicalLogitsWarper(0.9)]),
        ({"typical_p": 0.2}, [hf.TypicalLogitsWarper(0.2)]),
        ({"epsilon_cutoff": 5}, [hf.EpsilonLogitsWarper(5e-4)]),
        ({"epsilon_cutoff": 5000}, [hf.EpsilonLogitsWarper(0.5)]),
        ({"eta_cutoff": 30}, [hf.EtaLogitsWarper(30e-4)]),
        ({"eta_cutoff": 3000}, [hf.EtaLogitsWarper(0.3)]),
        (
            {"typical_p": 0.9, "epsilon_cutoff": 10, "eta_cutoff": 20},
            [hf.TypicalLogitsWarper(0.9), hf.EpsilonLogitsWarper(10e-4), hf.EtaLogitsWarper(20e-4)],
        ),
    ],
)
def test_what_is_kept_equals_transformers(params: dict[str, Any], warpers: list[hf.LogitsProcessor]) -> None:
    assert torch.equal(kept(params), kept_by(*warpers))
    assert 0 < int(kept(params).sum()) < SCORES.numel()


@pytest.mark.parametrize("top_a", [0.05, 0.5, 1e6])
def test_top_a_keeps_what_is_near_the_square_of_the_largest(top_a: float) -> None:
    probs = SCORES.softmax(-1)
    largest = probs.amax(-1, keepdim=True)
    assert torch.equal(kept({"top_a": top_a}), (probs >= top_a * largest**2) | (probs == largest))


@pytest.mark.parametrize("params", [{"typical_p": 0.0}, {"epsilon_cutoff": 1e4}, {"eta_cutoff": 1e4}, {"top_a": 1e6}])
def test_something_is_always_left(params: dict[str, Any]) -> None:
    assert kept(params).any(dim=-1).all()


def test_rows_are_filtered_by_their_own_parameters() -> None:
    kinds: list[dict[str, Any]] = [{}, {"typical_p": 0.5}, {"top_a": 0.4}, {"epsilon_cutoff": 30}, {"eta_cutoff": 40}]
    together = SCORES[: len(kinds)].clone()
    truncate(together, [SamplingParams(**params) for params in kinds])
    for row, params in enumerate(kinds):
        alone = SCORES[row : row + 1].clone()
        truncate(alone, [SamplingParams(**params)])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.1, [0.0, 0.0, 0.15, 0.08, 0.02]),
        (0.3, [0.0, 0.35, 0.15, 0.08, 0.02]),
        (0.38, [0.4, 0.35, 0.15, 0.08, 0.02]),  # one top choice alone is no choice
        (0.5, [0.4, 0.35, 0.15, 0.08, 0.02]),
        (0.0, [0.0, 0.0, 0.0, 0.0, 0.02]),
    ],
)
def test_xtc_leaves_the_least_likely_of_the_top_choices(threshold: float, expected: list[float]) -> None:
    weights = torch.tensor([[0.4, 0.35, 0.15, 0.08, 0.02, 0.0]]).double()
    left = without_top_choices(weights, weights.sum(-1), torch.tensor([threshold]).double())
    torch.testing.assert_close(left, torch.tensor([[*expected, 0.0]]).float().double())


PROBS = torch.tensor([0.15, 0.4, 0.08, 0.35, 0.02])


def share(count: int, **params: Any) -> Tensor:
    """How often each of the five tokens is drawn."""
    logits = torch.full((VOCAB_SIZE,), -torch.inf)
    logits[: len(PROBS)] = PROBS.log()
    seen = torch.bincount(torch.tensor(draws(logits, count, temperature=1.0, **params)), minlength=len(PROBS))
    assert seen[len(PROBS) :].sum() == 0
    return seen[: len(PROBS)] / count


def test_xtc_excludes_as_often_as_asked() -> None:
    excluded = torch.tensor([0.15, 0.0, 0.08, 0.0, 0.02])
    expected = 0.6 * excluded / excluded.sum() + 0.4 * PROBS
    torch.testing.assert_close(share(3200, xtc_probability=0.6), expected, atol=0.03, rtol=0)


def test_the_coin_of_xtc_tells_nothing_about_the_draw() -> None:
    """If coin and draw were one number, the excluding half would only see the lower half of the distribution."""
    expected = torch.tensor([0.6, 0.0, 0.32, 0.0, 0.08]) * 0.5 + 0.5 * PROBS
    torch.testing.assert_close(share(3200, xtc_probability=0.5), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("threshold", [0.002, 0.005])
def test_xtc_with_a_low_threshold_leaves_the_least_likely_top_choice_and_the_tail(threshold: float) -> None:
    """0.002 may have more top choices than the shortlist holds, 0.005 may not."""
    logits = random_logits(1, seed=4)[0] / 2
    probs = logits.softmax(0)
    top = probs[probs >= threshold]
    assert len(top) > 10
    drawn = draws(logits, 1280, temperature=1.0, xtc_probability=1.0, xtc_threshold=threshold)
    assert probs[drawn].max() == top.min()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"top_k": 3}, [1.0, 0.0, 0.0, 0.0, 0.0]),
        ({"top_k": 2}, [0.0, 0.0, 0.0, 1.0, 0.0]),
        ({"top_p": 0.95}, [15 / 23, 0.0, 8 / 23, 0.0, 0.0]),
        ({"min_p": 0.5}, [0.0, 0.0, 0.0, 1.0, 0.0]),
        ({"epsilon_cutoff": 500}, [15 / 23, 0.0, 8 / 23, 0.0, 0.0]),
    ],
)
def test_xtc_chooses_among_what_the_other_filters_leave(params: dict[str, Any], expected: list[float]) -> None:
    seen = share(1280, xtc_probability=1.0, **params)
    torch.testing.assert_close(seen, torch.tensor(expected), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        ({"typical_p": 0.3}, hf.TypicalLogitsWarper(0.3)),
        ({"epsilon_cutoff": 200}, hf.EpsilonLogitsWarper(0.02)),
        ({"eta_cutoff": 2000}, hf.EtaLogitsWarper(0.2)),
        ({"min_p": 0.2}, hf.MinPLogitsWarper(0.2)),
        ({"top_k": 12}, hf.TopKLogitsWarper(12)),
        ({"top_p": 0.4}, hf.TopPLogitsWarper(0.4)),
    ],
)
def test_drawn_tokens_are_among_and_reach_all_that_transformers_keeps(
    params: dict[str, Any], warper: hf.LogitsProcessor
) -> None:
    logits = random_logits(1, seed=3)
    logits[:, 60:] = -torch.inf
    allowed = torch.nonzero(kept_by(warper, scores=logits / 1.5)[0]).flatten().tolist()
    assert 1 < len(allowed) < 30
    assert set(draws(logits[0], 1920, temperature=1.5, **params)) == set(allowed)
