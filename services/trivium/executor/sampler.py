"""Choosing the next token of every row that reached the end of its sequence, all rows at once.

Random numbers are a hash of (seed, choice index, output position), so that a request draws the same numbers alone, in
any batch, after preemption and after a crash. A row's result depends on nothing but its own logits and parameters.
Order: banned tokens, temperature, min_p, top_k, top_p; forced tokens replace the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trivium.executor.input_batch import InputBatch, Longs
from trivium.executor.model_config import SpecialTokens

_SHORTLIST = 256  # candidates that top_k and top_p look at before they sort the whole vocabulary


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Parameters of the rows with a temperature; all [num_rows]. top_k 0 keeps all tokens."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor  # in (0, 1), float64


class Sampler:
    """Stateless between steps; `special` are the model's token ids."""

    def __init__(self, special: SpecialTokens) -> None:
        self._special = special

    def sample(self, logits: Tensor, batch: InputBatch, slots: Longs) -> Longs:
        """logits [num_rows, vocab_size] of the rows `slots` -> token ids [num_rows]. May overwrite `logits`."""
        columns = batch.sampling
        output_positions = batch.num_tokens[slots] - batch.num_prompt_tokens[slots]
        self._ban_early_stops(logits, batch, slots, output_positions)
        token_ids: Longs = logits.argmax(dim=-1).numpy()
        random = np.flatnonzero(columns.temperature[slots] > 0)
        if len(random):
            chosen, rows = slots[random], logits if len(random) == len(slots) else logits[torch.from_numpy(random)]
            uniform = uniform_numbers(columns.seed[chosen], columns.choice_index[chosen], output_positions[random])
            sampling = RowSampling(
                temperature=torch.from_numpy(columns.temperature[chosen]),
                top_k=torch.from_numpy(columns.top_k[chosen]),
                top_p=torch.from_numpy(columns.top_p[chosen]),
                min_p=torch.from_numpy(columns.min_p[chosen]),
                uniform=torch.from_numpy(uniform),
            )
            token_ids[random] = sample_rows(rows, sampling).numpy()
        self._force(token_ids, batch, slots, output_positions)
        return token_ids

    def _ban_early_stops(self, logits: Tensor, batch: InputBatch, slots: Longs, output_positions: Longs) -> None:
        for row in np.flatnonzero(output_positions < batch.sampling.min_tokens[slots]):
            banned = {*self._special.eos, *batch.sampling.stop_token_ids[slots[row]]}
            logits[int(row), [token_id for token_id in banned if token_id < logits.shape[1]]] = -torch.inf

    def _force(self, token_ids: Longs, batch: InputBatch, slots: Longs, output_positions: Longs) -> None:
        """As in transformers: the BOS follows a decoder prompt of one token, the EOS ends a row at its limit."""
        if self._special.forced_bos is not None:
            token_ids[batch.num_tokens[slots] == 1] = self._special.forced_bos
        if self._special.forced_eos is not None:
            at_limit = output_positions + 1 == batch.sampling.max_tokens[slots]
            token_ids[at_limit & ~batch.sampling.ignore_eos[slots]] = self._special.forced_eos


def sample_rows(logits: Tensor, sampling: RowSampling) -> Tensor:
    """Draw one token per row of `logits` [num_rows, vocab_size]. Returns [num_rows] int64."""
    probs = torch.softmax(logits / sampling.temperature[:, None], dim=-1)
    low = sampling.min_p[:, None] * probs.amax(dim=-1, keepdim=True)
    probs = probs.masked_fill(probs < low, 0.0)
    truncated = (sampling.top_k > 0) | (sampling.top_p < 1.0)
    token_ids = torch.empty(len(logits), dtype=torch.int64)
    for rows, draw in ((~truncated, _draw_from_all), (truncated, _draw_from_top)):
        if bool(rows.all()):
            return draw(probs, sampling.top_k, sampling.top_p, sampling.uniform)
        if bool(rows.any()):
            token_ids[rows] = draw(probs[rows], sampling.top_k[rows], sampling.top_p[rows], sampling.uniform[rows])
    return token_ids


def uniform_numbers(seeds: Longs, choice_indices: Longs, positions: Longs) -> npt.NDArray[np.float64]:
    """One number in (0, 1) per row, a hash of its three keys (splitmix64: https://doi.org/10.1145/2714064.2660195)."""
    state = _mix(seeds.astype(np.uint64))
    state = _mix(state ^ choice_indices.astype(np.uint64))
    state = _mix(state ^ positions.astype(np.uint64))
    return ((state >> np.uint64(16)).astype(np.float64) + 0.5) * 2.0**-48


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _draw_from_all(probs: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    return _inverse_cdf(probs, uniform)


def _draw_from_top(probs: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Rows whose kept tokens are all in their shortlist draw from it; the others sort their vocabulary."""
    vocab_size = probs.shape[1]
    shortlist = min(_SHORTLIST, vocab_size)
    limit = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size)
    values, indices = probs.topk(shortlist, dim=-1)
    mass = probs.sum(dim=-1, dtype=torch.float64)
    reached = values.sum(dim=-1, dtype=torch.float64) >= top_p * mass
    enough = (limit <= shortlist) | ((limit == vocab_size) & (top_p < 1.0) & reached)
    token_ids = _draw_from_sorted(values, indices, limit, top_p, mass, uniform)
    if not bool(enough.all()):
        rest = ~enough
        values, indices = probs[rest].sort(dim=-1, descending=True, stable=True)
        token_ids[rest] = _draw_from_sorted(values, indices, limit[rest], top_p[rest], mass[rest], uniform[rest])
    return token_ids


def _draw_from_sorted(
    values: Tensor, indices: Tensor, limit: Tensor, top_p: Tensor, mass: Tensor, uniform: Tensor
) -> Tensor:
    """values [num_rows, candidates] descending, mass [num_rows]: the sum over the whole vocabulary.

    top_p counts within what top_k leaves, and keeps the token that crosses the threshold.
    """
    beyond_k = torch.arange(values.shape[1]) >= limit[:, None]
    values = values.masked_fill(beyond_k, 0.0).double()
    before = values.cumsum(dim=-1) - values
    kept_mass = torch.where(limit <= values.shape[1], values.sum(dim=-1), mass)
    values = values.masked_fill((before >= top_p[:, None] * kept_mass[:, None]) & (before > 0), 0.0)
    return indices.gather(1, _inverse_cdf(values, uniform)[:, None]).squeeze(1)


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulated weight exceeds uniform * total; weights [num_rows, n] need not sum to 1."""
    cumulated = weights.double().cumsum(dim=-1)
    index = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True).squeeze(1)
    return index.clamp_(max=weights.shape[1] - 1)  # only weights that are not numbers get this far
