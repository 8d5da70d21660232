"""Choosing the next token of every row that reached the end of its sequence, all rows at once.

Order, of which a row does only what its parameters ask for:
1. allowed tokens, bans, bias, penalties, DRY (`logits_processors.py`); greedy rows then take the largest logit;
2. temperature;
3. typical_p, top_a, epsilon_cutoff, eta_cutoff (`truncation.py`), min_p: they look at the shape of the distribution,
   so they come before what counts tokens or mass; each sees what the ones before it have left;
4. top_k, then top_p within what top_k leaves;
5. XTC, which asks whether several good tokens are left, so it must come after all that decides which are good;
6. the draw; forced tokens (`logits_processors.forced_tokens`) replace its result.

Random numbers are a hash of (seed, choice index, output position), so that a request draws the same numbers alone, in
any batch, after preemption and after a crash. A row's result depends on nothing but its own logits, sequence and
parameters. Rows without the rarer parameters never pay for them.

Where the vocabulary is split over ranks, logits are those of this rank's tokens. Most rows then exchange a few numbers,
and with top_k or top_p their shortlists; rows with the parameters of 3 (but min_p), with XTC, or whose shortlist is too
short are gathered whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trivium.executor import transfers
from trivium.executor.history import History
from trivium.executor.input_batch import Bools, InputBatch, Longs
from trivium.executor.logits_processors import NOT_FORCED, edit_logits, forced_tokens
from trivium.executor.model_config import SpecialTokens
from trivium.executor.truncation import truncate, without_top_choices
from trivium.executor.vocabulary import WHOLE, Vocabulary, inverse_cdf
from trivium.params import SamplingParams

_SHORTLIST = 256  # candidates that top_k and top_p look at before they sort the whole vocabulary
_XTC_COINS = np.int64(2**62)  # added to an output position: keys that no draw has


@dataclass(frozen=True, slots=True)
class DrawLimits:
    """What a draw keeps; all [num_rows]. top_k 0 keeps all tokens."""

    top_k: Tensor
    top_p: Tensor
    xtc_threshold: Tensor  # float64
    uniform: Tensor  # in (0, 1), float64

    def subset(self, rows: Tensor) -> DrawLimits:
        return DrawLimits(self.top_k[rows], self.top_p[rows], self.xtc_threshold[rows], self.uniform[rows])


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Parameters of the rows with a temperature; tensors are [num_rows].

    truncated: row -> its parameters, of the rows that `truncation.truncate` has something to do for.
    excludes_top: whether XTC's coin fell for the row.
    """

    temperature: Tensor
    min_p: Tensor
    excludes_top: Tensor
    limits: DrawLimits
    truncated: Mapping[int, SamplingParams]


class Sampler:
    """Stateless between steps; `special` are the model's token ids."""

    def __init__(self, special: SpecialTokens, vocabulary: Vocabulary = WHOLE) -> None:
        self._special = special
        self._vocabulary = vocabulary

    def sample(self, logits: Tensor, batch: InputBatch, slots: Longs) -> Longs:
        """logits [num_rows, vocab_size] of the rows `slots` -> token ids [num_rows]. May overwrite `logits`."""
        columns = batch.sampling
        output_positions = batch.num_tokens[slots] - batch.num_prompt_tokens[slots]
        edited = np.flatnonzero(columns.edits_logits[slots] | (output_positions < columns.min_tokens[slots]))
        if len(edited):
            self._edit(logits, batch, slots, edited)
        token_ids: Longs = transfers.download(self._vocabulary.argmax(logits))
        random = np.flatnonzero(columns.temperature[slots] > 0)
        if len(random):
            device = logits.device
            rows = logits if len(random) == len(slots) else logits[transfers.upload(random, device)]
            sampling = _row_sampling(batch, slots[random], output_positions[random], device)
            token_ids[random] = transfers.download(sample_rows(rows, sampling, self._vocabulary))
        forced = self.forced(batch, slots)
        np.copyto(token_ids, forced, where=forced != NOT_FORCED)
        return token_ids

    def forced(self, batch: InputBatch, slots: Longs) -> Longs:
        """[num_rows] the only token that may come next, or NOT_FORCED."""
        columns = batch.sampling
        output_positions = batch.num_tokens[slots] - batch.num_prompt_tokens[slots]
        num_tokens, max_tokens = batch.num_own_tokens(slots), columns.max_tokens[slots]
        params = [columns.params[slot] for slot in slots]
        return forced_tokens(params, num_tokens, output_positions, self._special, max_tokens)

    def find_ends(self, batch: InputBatch, slots: Longs, token_ids: Longs, num_outputs: Longs | None = None) -> Bools:
        """[num_rows] True where `token_ids`, appended already, end their rows by EOS or a stop token id.

        num_outputs: the length of each output with its token, where that is not what the batch says by now. The
        scheduler decides the same from the result; knowing it here saves the rows of plans that are on their way.
        """
        columns = batch.sampling
        if num_outputs is None:
            num_outputs = batch.num_tokens[slots] - batch.num_prompt_tokens[slots]
        is_eos = np.isin(token_ids, self._special.eos) & ~columns.ignore_eos[slots]
        is_eos &= num_outputs >= columns.min_tokens_to_eos[slots]
        is_stop = [token in columns.params[slot].stop_token_ids for slot, token in zip(slots, token_ids, strict=True)]
        ends: Bools = is_eos | (np.array(is_stop, np.bool_) & (num_outputs >= columns.min_tokens[slots]))
        return ends

    def _edit(self, logits: Tensor, batch: InputBatch, slots: Longs, edited: Longs) -> None:
        index = transfers.upload(edited, logits.device)
        rows = logits if len(edited) == len(logits) else logits[index]
        params = [batch.sampling.params[slot] for slot in slots[edited]]
        edit_logits(rows, params, History.of(batch, slots[edited]), self._special, self._vocabulary)
        if rows is not logits:
            logits[index] = rows


def _row_sampling(batch: InputBatch, slots: Longs, output_positions: Longs, device: torch.device) -> RowSampling:
    columns = batch.sampling
    seed, choice_index = columns.seed[slots], columns.choice_index[slots]
    excludes_top = columns.xtc_probability[slots] > 0
    if excludes_top.any():
        coins = uniform_numbers(seed, choice_index, output_positions + _XTC_COINS)
        excludes_top = coins < columns.xtc_probability[slots]
    uniform = uniform_numbers(seed, choice_index, output_positions)
    by_row = (columns.temperature, columns.min_p, columns.top_k, columns.top_p, columns.xtc_threshold)
    temperature, min_p, top_k, top_p, xtc_threshold, excluding, uniforms = transfers.upload_all(
        (*(column[slots] for column in by_row), excludes_top, uniform), device
    )
    return RowSampling(
        temperature=temperature,
        min_p=min_p,
        excludes_top=excluding,
        limits=DrawLimits(top_k=top_k, top_p=top_p, xtc_threshold=xtc_threshold, uniform=uniforms),
        truncated={int(row): columns.params[slots[row]] for row in np.flatnonzero(columns.truncates[slots])},
    )


def sample_rows(logits: Tensor, sampling: RowSampling, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Draw one token per row of `logits` [num_rows, vocab_size]. Returns [num_rows] int64."""
    scores = logits / sampling.temperature[:, None]
    if sampling.truncated:
        rows = transfers.upload(np.array(list(sampling.truncated), np.int64), scores.device)
        chosen = vocabulary.gather(scores[rows])
        truncate(chosen, list(sampling.truncated.values()))
        scores[rows] = vocabulary.own(chosen)
    probs = vocabulary.softmax(scores)
    if bool(sampling.min_p.any()):
        probs = probs.masked_fill(probs < sampling.min_p[:, None] * vocabulary.amax(probs), 0.0)
    limits, excludes_top = sampling.limits, sampling.excludes_top
    is_limited = (limits.top_k > 0) | (limits.top_p < 1.0)
    is_short = ~is_limited & (limits.xtc_threshold * _SHORTLIST > 1.0)  # fewer top choices than the shortlist holds
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for mask, draw in (
        (~is_limited & ~excludes_top, _draw_from_all),
        (is_limited & ~excludes_top, _draw_from_top),
        (excludes_top & is_short, _draw_without_few_top_choices),
        (excludes_top & ~is_short, _draw_without_top_choices),
    ):
        if bool(mask.all()):
            return draw(probs, limits, vocabulary)
        if bool(mask.any()):
            token_ids[mask] = draw(probs[mask], limits.subset(mask), vocabulary)
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


def _draw_from_all(probs: Tensor, limits: DrawLimits, vocabulary: Vocabulary) -> Tensor:
    return vocabulary.draw(probs, limits.uniform)


def _draw_from_top(probs: Tensor, limits: DrawLimits, vocabulary: Vocabulary) -> Tensor:
    """Rows whose kept tokens are all in their shortlist draw from it; the others sort their vocabulary."""
    vocab_size = vocabulary.size(probs)
    shortlist = min(_SHORTLIST, vocab_size)
    num_kept = _num_kept(limits, vocab_size)
    values, indices = vocabulary.top_k(probs, shortlist)
    mass = vocabulary.sum(probs)
    reached = values.sum(dim=-1, dtype=torch.float64) >= limits.top_p * mass
    enough = (num_kept <= shortlist) | ((num_kept == vocab_size) & (limits.top_p < 1.0) & reached)
    token_ids = _pick(_keep_top(values, limits, num_kept, mass), indices, limits)
    if not bool(enough.all()):
        rest = ~enough
        values, indices = vocabulary.gather(probs[rest]).sort(dim=-1, descending=True, stable=True)
        limits = limits.subset(rest)
        token_ids[rest] = _pick(_keep_top(values, limits, num_kept[rest], mass[rest]), indices, limits)
    return token_ids


def _draw_without_few_top_choices(probs: Tensor, limits: DrawLimits, vocabulary: Vocabulary) -> Tensor:
    """XTC for rows without top_k and top_p whose top choices are all in a shortlist."""
    probs = vocabulary.gather(probs)
    values, indices = probs.topk(min(_SHORTLIST, probs.shape[1]), dim=-1)
    mass = probs.sum(dim=-1, dtype=torch.float64)
    left = without_top_choices(values, mass, limits.xtc_threshold)
    return inverse_cdf(probs.scatter(1, indices, left), limits.uniform)


def _draw_without_top_choices(probs: Tensor, limits: DrawLimits, vocabulary: Vocabulary) -> Tensor:
    probs = vocabulary.gather(probs)
    values, indices = probs.sort(dim=-1, descending=True, stable=True)
    mass = values.sum(dim=-1, dtype=torch.float64)
    kept = _keep_top(values, limits, _num_kept(limits, probs.shape[1]), mass)
    return _pick(without_top_choices(kept, kept.sum(dim=-1), limits.xtc_threshold), indices, limits)


def _num_kept(limits: DrawLimits, vocab_size: int) -> Tensor:
    """[num_rows] what top_k keeps."""
    return torch.where(limits.top_k > 0, limits.top_k.clamp(max=vocab_size), vocab_size)


def _keep_top(values: Tensor, limits: DrawLimits, num_kept: Tensor, mass: Tensor) -> Tensor:
    """values [num_rows, candidates] descending, as float64 without what top_k and top_p leave out.

    mass [num_rows]: the sum over the whole vocabulary. top_p counts within what top_k leaves, and keeps the token that
    crosses the threshold.
    """
    places = torch.arange(values.shape[1], device=values.device)
    values = values.masked_fill(places >= num_kept[:, None], 0.0).double()
    before = values.cumsum(dim=-1) - values
    kept_mass = torch.where(num_kept <= values.shape[1], values.sum(dim=-1), mass)
    return values.masked_fill((before >= (limits.top_p * kept_mass)[:, None]) & (before > 0), 0.0)


def _pick(values: Tensor, indices: Tensor, limits: DrawLimits) -> Tensor:
    return indices.gather(1, inverse_cdf(values, limits.uniform)[:, None]).squeeze(1)
