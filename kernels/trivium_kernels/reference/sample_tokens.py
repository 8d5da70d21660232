"""`sample_tokens` in plain torch, by sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium_kernels.sample_tokens import TokenSampling

# The constants of splitmix64 as signed numbers: torch has no unsigned arithmetic, and the bits are the same.
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def sample_tokens(logits: Tensor, sampling: TokenSampling) -> Tensor:
    is_greedy = sampling.temperature == 0
    temperature = sampling.temperature.masked_fill(is_greedy, 1.0)[:, None]
    scores = logits.float() / temperature
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True)).nan_to_num(0.0)
    weights = weights.masked_fill(weights < sampling.min_p[:, None], 0.0)
    values, indices = weights.sort(dim=-1, descending=True, stable=True)
    values = _kept(values.double(), sampling)
    uniform = uniform_numbers(sampling.seed, sampling.choice_index, sampling.position)
    from_top = indices.gather(1, _inverse_cdf(values, uniform)).squeeze(1)
    from_all = _inverse_cdf(weights.double(), uniform).squeeze(1)
    is_limited = (sampling.top_k > 0) | (sampling.top_p < 1)
    drawn = torch.where(is_limited, from_top, from_all)
    return torch.where(is_greedy | (weights.sum(dim=-1) == 0), logits.argmax(dim=-1), drawn)


def uniform_numbers(seed: Tensor, choice_index: Tensor, position: Tensor) -> Tensor:
    """[num_rows] float64 in (0, 1), of int64 keys."""
    state = _mix(_mix(_mix(seed) ^ choice_index) ^ position)
    return (_shifted(state, 16).double() + 0.5) * 2.0**-48


def _mix(state: Tensor) -> Tensor:
    state = state + _STEP
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """`state` as 64 unsigned bits, moved right."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _kept(values: Tensor, sampling: TokenSampling) -> Tensor:
    """values [num_rows, vocab_size] descending, with zeros for what top_k and top_p leave out."""
    vocab_size = values.shape[1]
    num_kept = torch.where(sampling.top_k > 0, sampling.top_k.clamp(max=vocab_size), vocab_size)[:, None]
    values = values.masked_fill(torch.arange(vocab_size, device=values.device) >= num_kept, 0.0)
    before = values.cumsum(dim=-1) - values
    limit = sampling.top_p[:, None] * values.sum(dim=-1, keepdim=True)
    return values.masked_fill((sampling.top_p[:, None] < 1) & (before >= limit) & (before > 0), 0.0)


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """[num_rows, 1] the first index whose cumulated weight exceeds uniform * total."""
    cumulated = weights.cumsum(dim=-1)
    index = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
    return index.clamp_(max=weights.shape[1] - 1)
