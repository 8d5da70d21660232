"""Beam search on the executor: candidates of every group in the batch, and the rows and block tables that follow.

Order of effects in `select`: log-probabilities of all beams are edited together (bans, penalties, forced tokens, as in
transformers: on log-probabilities, not on logits); then group by group candidates are found, the search advances, and
rows and block tables are moved. The blocks to copy are returned: the caller copies them before the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trivium.beam_search import BeamSearch, move_blocks
from trivium.executor import transfers
from trivium.executor.grammars import GrammarRows
from trivium.executor.history import History
from trivium.executor.input_batch import InputBatch, Longs
from trivium.executor.logits_processors import edit_logits, force_scores
from trivium.executor.logprobs import token_logprobs
from trivium.executor.model_config import SpecialTokens
from trivium.executor.stop_strings import StopStrings, TokenTextService
from trivium.executor.vocabulary import WHOLE, Vocabulary
from trivium.params import BeamSettings
from trivium.step import BeamCandidates, NewRequestData, SlotFailure


@dataclass(frozen=True, slots=True)
class BeamGroup:
    """The rows of one request: `searches[g]` owns slots [g * width, (g + 1) * width) of `slots`."""

    slots: Longs
    searches: tuple[BeamSearch, ...]
    beam: BeamSettings
    stop: StopStrings | None

    @property
    def is_started(self) -> bool:
        return self.searches[0].num_tokens > 0

    def slots_of(self, index: int) -> Longs:
        width = self.searches[index].width
        slots: Longs = self.slots[index * width : (index + 1) * width]
        return slots


@dataclass(frozen=True, slots=True)
class Selection:
    """What a step did to the groups: their candidates, and the block copies (from, to) that the beams need.

    first_copies come before `copies`, which read what they write.
    """

    candidates: tuple[BeamCandidates, ...]
    first_copies: tuple[tuple[int, int], ...]
    copies: tuple[tuple[int, int], ...]


class BeamGroups:
    """The beam searches of a standing batch. Owner: the ModelRunner. `grammars` are those of all rows."""

    def __init__(
        self,
        special: SpecialTokens,
        grammars: GrammarRows,
        texts: TokenTextService,
        vocabulary: Vocabulary = WHOLE,
    ) -> None:
        self._special = special
        self._grammars = grammars
        self._texts = texts
        self._vocabulary = vocabulary
        self._groups: dict[int, BeamGroup] = {}  # slot of the first beam -> group

    def __len__(self) -> int:
        return len(self._groups)

    def apply(self, freed_slots: Sequence[int], new_requests: Sequence[NewRequestData]) -> None:
        """Forget groups whose first slot is freed; begin a search for each new group."""
        for slot in freed_slots:
            self._groups.pop(slot, None)
        for new in new_requests:
            beam = new.sampling.beam
            if beam is not None:
                searches = tuple(
                    BeamSearch(beam, new.sampling, new.max_tokens, self._special.eos) for _ in range(beam.num_groups)
                )
                stop = StopStrings(new.sampling, self._texts.get()) if new.sampling.stop else None
                self._groups[new.slot] = BeamGroup(np.array(new.beam_slots, np.int64), searches, beam, stop)

    def select(self, logits: Tensor, batch: InputBatch, slots: Longs) -> Selection:
        """Advance the groups whose rows `slots` reached the end of their sequences.

        logits [num_rows, vocab_size] of those rows. Appends the chosen tokens to the rows and marks rows of searches
        that are done as ended.
        """
        vocabulary = self._vocabulary
        scores = vocabulary.log_softmax(logits.float())
        if len(self._grammars):
            self._grammars.mask(scores, slots)
        self._edit(scores, batch, slots)
        num_candidates = max(search.num_candidates for group in self._groups.values() for search in group.searches)
        values, token_ids = vocabulary.top_k(scores, min(vocabulary.size(scores), num_candidates))
        row_of = {int(slot): row for row, slot in enumerate(slots)}
        best = _Best(transfers.download(values), transfers.download(token_ids), row_of, scores, logits, vocabulary)
        candidates: list[BeamCandidates] = []
        first_copies: list[tuple[int, int]] = []
        copies: list[tuple[int, int]] = []
        for first_slot, group in self._groups.items():
            if not group.is_started and first_slot in best.row_of:
                first_copies += _start_rows(batch, group)
                self._grammars.start_beams(group.slots)
                best.alias(first_slot, group.slots)
            chosen = np.zeros(0, np.int64)  # tokens of the groups before, which the next one avoids
            for index in range(len(group.searches)):
                group_slots = group.slots_of(index)
                if int(group_slots[0]) not in best.row_of:
                    continue
                found = _find_candidates(group, index, best, chosen)
                num_top = int(batch.sampling.num_logprobs[first_slot])
                if num_top >= 0:
                    found = _with_logprobs(found, best, group_slots, num_top)
                if group.stop is not None:
                    found = replace(found, stops=group.stop.completed(found, batch, group_slots.tolist()))
                candidates.append(found)
                copies += _advance(batch, group.searches[index], group_slots, found, self._grammars)
                chosen = np.concatenate((chosen, _live_token_ids(group.searches[index])))
        return Selection(tuple(candidates), tuple(first_copies), tuple(copies))

    def take_failures(self, batch: InputBatch) -> tuple[SlotFailure, ...]:
        """Groups with a beam that cannot or must not go on, told once; the rows of the former have ended.

        One whose prompt is not computed yet goes on until it is: others may share its blocks.
        """
        failures = []
        for first_slot, group in self._groups.items():
            if not group.is_started:
                continue
            found = self._grammars.take_failures(group.slots)
            if found:
                batch.ended[group.slots] = True
            found += self._grammars.take_slow(group.slots)
            if found:
                failures.append(SlotFailure(first_slot, found[0].message))
        return tuple(failures)

    def _edit(self, scores: Tensor, batch: InputBatch, slots: Longs) -> None:
        columns = batch.sampling
        output_positions = batch.num_tokens[slots] - batch.num_prompt_tokens[slots]
        edited = np.flatnonzero(columns.edits_logits[slots] | (output_positions < columns.min_tokens[slots]))
        if len(edited):
            index = transfers.upload(edited, scores.device)
            rows = scores if len(edited) == len(scores) else scores[index]
            params = [columns.params[slot] for slot in slots[edited]]
            edit_logits(rows, params, History.of(batch, slots[edited]), self._special, self._vocabulary)
            if rows is not scores:
                scores[index] = rows
        params = [columns.params[slot] for slot in slots]
        num_tokens, max_tokens, start = batch.num_own_tokens(slots), columns.max_tokens[slots], self._vocabulary.start
        force_scores(scores, params, num_tokens, output_positions, self._special, max_tokens, start=start)


@dataclass(slots=True)
class _Best:
    """The best continuations of every row: values, token_ids [num_rows, num_best], of `scores` [num_rows, vocab].

    logits [num_rows, vocab]: as the model made them.
    """

    values: np.typing.NDArray[np.float32]
    token_ids: Longs
    row_of: dict[int, int]  # slot -> row
    scores: Tensor
    logits: Tensor
    vocabulary: Vocabulary

    def alias(self, slot: int, others: Longs) -> None:
        """Let `others` have the row of `slot`."""
        self.row_of.update({int(other): self.row_of[slot] for other in others})


def _find_candidates(group: BeamGroup, index: int, best: _Best, chosen: Longs) -> BeamCandidates:
    search = group.searches[index]
    slots = group.slots_of(index)
    rows = np.array([best.row_of[int(slot)] for slot in slots])
    if len(chosen) and group.beam.diversity_penalty:
        of_rows, tokens = transfers.upload_all((rows, chosen), best.scores.device)
        scores, vocabulary = best.scores[of_rows], best.vocabulary
        counts = torch.bincount(tokens, minlength=vocabulary.size(scores))[None]
        scores = scores - group.beam.diversity_penalty * vocabulary.own(counts)
        values, token_ids = (transfers.download(found) for found in vocabulary.top_k(scores, best.values.shape[1]))
    else:
        values, token_ids = best.values[rows], best.token_ids[rows]
    sums = values + np.array(search.scores, np.float32)[:, None]
    order = np.argsort(-sums, axis=None, kind="stable")[: search.num_candidates]
    return BeamCandidates(
        slot=int(slots[0]),
        scores=tuple(sums.reshape(-1)[order].tolist()),
        beams=tuple((order // sums.shape[1]).tolist()),
        token_ids=tuple(token_ids.reshape(-1)[order].tolist()),
    )


def _with_logprobs(candidates: BeamCandidates, best: _Best, slots: Longs, num_top: int) -> BeamCandidates:
    """`candidates` with the model's own log-probabilities of their tokens."""
    rows = np.array([best.row_of[int(slots[beam])] for beam in candidates.beams], np.int64)
    logits = best.logits[transfers.upload(rows, best.logits.device)]
    token_ids = np.array(candidates.token_ids, np.int64)
    logprobs = token_logprobs(logits, token_ids, [num_top] * len(rows), best.vocabulary)
    return replace(candidates, logprobs=tuple(logprobs))


def _start_rows(batch: InputBatch, group: BeamGroup) -> list[tuple[int, int]]:
    """The prompt is computed: the other beams are where the first one is.

    The block copies that give the first beam of every search the partial block of the prompt.
    """
    first = group.slots[0]
    num_computed = int(batch.num_computed_tokens[first])
    batch.num_computed_tokens[group.slots] = num_computed
    index, offset = divmod(num_computed, batch.limits.block_size)
    if offset == 0:
        return []
    others = [group.slots_of(search)[0] for search in range(1, len(group.searches))]
    return [(int(batch.block_tables[first, index]), int(batch.block_tables[slot, index])) for slot in others]


def _advance(
    batch: InputBatch, search: BeamSearch, slots: Longs, candidates: BeamCandidates, grammars: GrammarRows
) -> list[tuple[int, int]]:
    """Advance the search of the rows `slots`; move and extend the rows as it says. Returns the block copies."""
    num_computed = int(batch.num_computed_tokens[slots[0]])
    parents = search.advance(candidates)
    if search.is_done:
        batch.ended[slots] = True
        batch.append_tokens(slots, _live_token_ids(search))  # plans that are on their way expect one
        return []
    num_blocks = batch.num_blocks[slots]
    tables = [batch.block_tables[slot, :count].tolist() for slot, count in zip(slots, num_blocks, strict=True)]
    moved, copies = move_blocks(tables, parents, num_computed, batch.limits.block_size)
    for slot, table in zip(slots, moved, strict=True):
        batch.block_tables[slot, : len(table)] = table
    start, end = int(batch.num_prompt_tokens[slots[0]]), int(batch.num_tokens[slots[0]])
    batch.token_ids[slots, start:end] = batch.token_ids[slots[list(parents)], start:end]
    batch.append_tokens(slots, _live_token_ids(search))
    grammars.fork(slots, parents, _live_token_ids(search), batch)
    return copies


def _live_token_ids(search: BeamSearch) -> Longs:
    return np.array([tail.token_id for tail in search.tails if tail is not None], np.int64)
