"""Speculation from the source text: what followed the last few tokens before is guessed to follow them again.

Summaries and corrections copy their source, so an n-gram lookup over encoder input, prompt and output often guesses
right (https://github.com/apoorvumang/prompt-lookup-decoding). A row that guesses computes its drafts together with its
last token; `verify` then samples position by position and keeps what the sampler would have said anyway, so the output
is the same with and without. Keys and values of wrong drafts lie behind the end of the row, where later tokens
overwrite them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trivium.executor import transfers
from trivium.executor.input_batch import InputBatch, Longs, ScheduledRows
from trivium.executor.models.model import NOT_A_TOKEN
from trivium.step import TokenRun

MAX_NGRAM = 3  # the longest end of a sequence that is looked up, the shorter ones if it was not there before

Sample = Callable[[Tensor, Longs], Longs]  # (logits [num_rows, vocab_size], slots) -> token ids; appends them


@dataclass(frozen=True, slots=True)
class Drafts:
    """Guesses of one step: row `rows[i]` of the step computes `token_ids[i]` behind its last token."""

    rows: Longs
    token_ids: list[Longs]


def add_drafts(batch: InputBatch, rows: ScheduledRows) -> tuple[ScheduledRows, Drafts]:
    """The step with the drafts of the rows that look up and are to sample, as far as blocks and `max_tokens` reach.

    The drafts are in `batch.token_ids` behind the ends of the sequences.
    """
    found: dict[int, Longs] = {}
    at_end = batch.rows_that_sample(rows) & (rows.num_tokens == 1)
    for row in np.flatnonzero(at_end & (batch.sampling.num_lookup_tokens[rows.slots] > 0)):
        slot = int(rows.slots[row])
        draft = find_draft(_sources(batch, slot), _room(batch, slot))
        if len(draft):
            end = int(batch.num_tokens[slot])
            batch.token_ids[slot, end : end + len(draft)] = draft
            found[slot] = draft
    if not found:
        return rows, Drafts(np.zeros(0, np.int64), [])
    extra = np.array([len(found.get(int(slot), ())) for slot in rows.slots], np.int64)
    packed = batch.pack_rows(rows.slots, rows.num_tokens + extra)
    drafted = np.array([row for row, slot in enumerate(packed.slots) if int(slot) in found], np.int64)
    return packed, Drafts(drafted, [found[int(packed.slots[row])] for row in drafted])


def find_draft(sources: list[Longs], max_tokens: int) -> Longs:
    """At most `max_tokens` tokens that followed the end of the last source, where it occurs before.

    Longer ends first; among equals the last source, and in it the last place, but another one if that has no more
    tokens behind it. What is NOT_A_TOKEN matches nothing and is not guessed.
    """
    sequence = sources[-1]
    for size in range(min(MAX_NGRAM, len(sequence) - 1), 0, -1):
        end = sequence[-size:]
        if (end == NOT_A_TOKEN).any():
            continue
        for source in reversed(sources):
            starts = len(source) - size  # windows that have a token behind them
            if starts < 1:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(source[:-1], size)
            places = np.flatnonzero((windows == end).all(axis=1))
            if len(places):
                start = int(places[-1]) + size
                draft = source[start : start + max_tokens]
                no_tokens = np.flatnonzero(draft == NOT_A_TOKEN)
                return draft[: no_tokens[0]] if len(no_tokens) else draft
    return sequence[:0]


def verify(
    batch: InputBatch, rows: ScheduledRows, drafts: Drafts, logits: Tensor, sample: Sample
) -> tuple[TokenRun, ...]:
    """Sample the rows with drafts, position by position, as long as the drafts say the same.

    logits [num_positions, vocab_size]: of the last token and the drafts of each of `drafts.rows`, in order. Call after
    the batch has advanced.
    """
    slots = rows.slots[drafts.rows]
    counts = np.array([1 + len(draft) for draft in drafts.token_ids], np.int64)
    first = np.cumsum(counts) - counts
    runs: list[list[int]] = [[] for _ in slots]
    going_on = np.arange(len(slots))
    for position in range(int(counts.max())):
        token_ids = sample(logits[transfers.upload(first[going_on] + position, logits.device)], slots[going_on])
        stays = np.zeros(len(going_on), np.bool_)
        for index, (run, token_id) in enumerate(zip(going_on, token_ids.tolist(), strict=True)):
            runs[run].append(token_id)
            draft = drafts.token_ids[run]
            right = position < len(draft) and int(draft[position]) == token_id
            stays[index] = right and not batch.ended[slots[run]]
        going_on = going_on[stays]
        if not len(going_on):
            break
    batch.num_computed_tokens[slots] = batch.num_tokens[slots] - 1
    num_outputs = batch.num_tokens[slots] - batch.num_prompt_tokens[slots]
    batch.ended[slots] |= num_outputs >= batch.sampling.max_tokens[slots]
    return tuple(TokenRun(int(slot), tuple(run)) for slot, run in zip(slots, runs, strict=True))


def draft_positions(rows: ScheduledRows, drafts: Drafts) -> Longs:
    """Where the last tokens and the drafts of `drafts.rows` are among the step's tokens."""
    starts = np.cumsum(rows.num_tokens) - rows.num_tokens
    return np.concatenate([starts[row] + np.arange(rows.num_tokens[row]) for row in drafts.rows])


def _sources(batch: InputBatch, slot: int) -> list[Longs]:
    sequence = batch.token_ids[slot, : batch.num_tokens[slot]].astype(np.int64)
    return [batch.encoder_token_ids[slot], sequence] if batch.encoder_lens[slot] else [sequence]


def _room(batch: InputBatch, slot: int) -> int:
    """How many drafts a row may compute."""
    num_tokens, num_prompt_tokens = int(batch.num_tokens[slot]), int(batch.num_prompt_tokens[slot])
    in_blocks = int(batch.num_blocks[slot]) * batch.limits.block_size - num_tokens
    of_output = int(batch.sampling.max_tokens[slot]) - (num_tokens - num_prompt_tokens) - 1
    in_context = batch.limits.max_model_len - num_tokens
    return max(0, min(int(batch.sampling.num_lookup_tokens[slot]), in_blocks, of_output, in_context))
