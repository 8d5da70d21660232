"""Leaving out tokens before a random choice: the filters that few requests use. min_p, top_k, top_p: `sampler.py`.

Each filter sees what the ones before it have left, as in transformers, and never leaves out everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from trivium.executor import transfers
from trivium.params import SamplingParams

CUTOFF_UNIT = 1e-4  # of epsilon_cutoff and eta_cutoff

Filter = Callable[[Tensor, Tensor], Tensor]  # scores [num_rows, vocab_size], parameter [num_rows, 1] -> True: leave out


def truncate(scores: Tensor, params: Sequence[SamplingParams]) -> None:
    """Set what the parameters leave out to -inf. scores [num_rows, vocab_size]: logits divided by the temperature."""
    _apply(scores, atypical, [row.typical_p for row in params], neutral=1.0)
    _apply(scores, below_top_a, [row.top_a for row in params], neutral=0.0)
    _apply(scores, below_epsilon, [row.epsilon_cutoff * CUTOFF_UNIT for row in params], neutral=0.0)
    _apply(scores, below_eta, [row.eta_cutoff * CUTOFF_UNIT for row in params], neutral=0.0)


def _apply(scores: Tensor, leaves_out: Filter, values: list[float], *, neutral: float) -> None:
    rows = [row for row, value in enumerate(values) if value != neutral]
    if rows:
        index, parameter = transfers.upload_all(
            (np.array(rows, np.int64), np.array([values[row] for row in rows], np.float32)), scores.device
        )
        chosen = scores[index]
        scores[index] = chosen.masked_fill(leaves_out(chosen, parameter[:, None]), -torch.inf)


def atypical(scores: Tensor, mass: Tensor) -> Tensor:
    """All but the tokens whose surprise is nearest to the mean, up to `mass` (https://arxiv.org/abs/2202.00666)."""
    log_probs = torch.log_softmax(scores, dim=-1)
    probs = log_probs.exp()
    distance = (-log_probs - _entropy(log_probs)).abs()
    ordered, order = distance.sort(dim=-1, stable=True)
    crossing = (probs.gather(1, order).cumsum(dim=-1) < mass).sum(dim=-1, keepdim=True)
    return distance > ordered.gather(1, crossing.clamp(max=scores.shape[1] - 1))


def below_top_a(scores: Tensor, top_a: Tensor) -> Tensor:
    """p < top_a * max(p) ** 2 (https://github.com/BlinkDL/RWKV-LM, "top-a sampling")."""
    probs = torch.softmax(scores, dim=-1)
    largest = probs.amax(dim=-1, keepdim=True)
    return _but_the_largest(probs < top_a * largest**2, scores)


def below_epsilon(scores: Tensor, epsilon: Tensor) -> Tensor:
    """p < epsilon (https://arxiv.org/abs/2210.15191)."""
    return _but_the_largest(torch.softmax(scores, dim=-1) < epsilon, scores)


def below_eta(scores: Tensor, epsilon: Tensor) -> Tensor:
    """p < min(epsilon, sqrt(epsilon) * exp(-entropy)) (https://arxiv.org/abs/2210.15191)."""
    log_probs = torch.log_softmax(scores, dim=-1)
    eta = torch.minimum(epsilon, epsilon.sqrt() * torch.exp(-_entropy(log_probs)))
    return _but_the_largest(log_probs.exp() < eta, scores)


def without_top_choices(weights: Tensor, mass: Tensor, threshold: Tensor) -> Tensor:
    """XTC (https://github.com/oobabooga/textgen/pull/6335) on weights [num_rows, n] in descending order.

    Of the tokens with at least `threshold` of their row's `mass` only the last, the least likely, keeps its weight.
    """
    is_top = (weights >= threshold[:, None] * mass[:, None]) & (weights > 0)
    num_excluded = is_top.sum(dim=-1, keepdim=True) - 1
    return weights.masked_fill(torch.arange(weights.shape[1], device=weights.device) < num_excluded, 0.0)


def _entropy(log_probs: Tensor) -> Tensor:
    """[num_rows, 1]; a token that is left out already counts as nothing."""
    return -(log_probs.exp() * log_probs).nansum(dim=-1, keepdim=True)


def _but_the_largest(mask: Tensor, scores: Tensor) -> Tensor:
    return mask & (scores < scores.amax(dim=-1, keepdim=True))
