"""Checking a plan against the standing batch, as a whole, before anything is touched.

A plan that fails shows that scheduler and executor disagree about the batch: the stream that sent it is ended.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trivium.executor.input_batch import InputBatch
from trivium.executor.soft_prompt import SoftPrompt
from trivium.step import NewRequestData, SchedulerOutput


class PlanError(ValueError):
    """The plan does not fit the standing batch; the batch is as it was before."""


def check_plan(batch: InputBatch, plan: SchedulerOutput) -> None:
    """Raise PlanError, naming the slot and the number that is wrong, unless `plan` can be applied and run."""
    _Check(batch).run(plan)


class _Check:
    """The batch as it would be: copies of the small arrays that decide whether a plan fits."""

    def __init__(self, batch: InputBatch) -> None:
        self._batch = batch
        self._limits = batch.limits
        self._occupied = batch.occupied.copy()
        self._ended = batch.ended.copy()
        self._num_blocks = batch.num_blocks.copy()
        self._num_tokens = batch.num_tokens.copy()
        self._num_computed_tokens = batch.num_computed_tokens.copy()
        self._output_left = batch.sampling.max_tokens - (batch.num_tokens - batch.num_prompt_tokens)
        self._encoder_lens = batch.encoder_lens.copy()
        self._lacks_encoder_embeds = np.zeros(len(batch.occupied), np.bool_)  # of the slots that the plan initialises

    def run(self, plan: SchedulerOutput) -> None:
        self._free(plan.freed_slots)
        for new in plan.new_requests:
            self._add(new)
        self._grow(plan.new_blocks.slots, plan.new_blocks.block_ids)
        self._move_blocks(plan)
        self._encode(plan.encoder_slots)
        self._schedule(plan.scheduled_slots, plan.num_scheduled_tokens)

    def _free(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._require_occupied(slot, "freed")
            self._occupied[slot] = False

    def _add(self, new: NewRequestData) -> None:
        slot, limits = new.slot, self._limits
        _require(0 <= slot < limits.max_num_seqs, f"slot {slot} is outside the {limits.max_num_seqs} slots")
        _require(not self._occupied[slot], f"slot {slot} is initialised, but it is in use")
        is_known = not new.adapter or new.adapter in self._batch.adapter_indices
        _require(is_known, f"slot {slot} has adapter {new.adapter!r}, which is not loaded")
        num_tokens = len(new.prompt_token_ids) + len(new.output_token_ids)
        _require(
            len(new.prompt_token_ids) >= 1 and num_tokens <= limits.max_model_len,
            f"slot {slot} has {len(new.prompt_token_ids)} prompt and {num_tokens} tokens; limit {limits.max_model_len}",
        )
        _require(
            0 <= new.num_computed_tokens < num_tokens,
            f"slot {slot} has {new.num_computed_tokens} of {num_tokens} tokens computed",
        )
        _require(
            len(new.output_token_ids) < new.max_tokens,
            f"slot {slot} has {len(new.output_token_ids)} of at most {new.max_tokens} output tokens",
        )
        self._check_encoder_input(new)
        soft = self._batch.soft_prompts.get(new.prompt_adapter)
        is_loaded = soft is not None or not new.prompt_adapter
        _require(is_loaded, f"slot {slot} has prompt adapter {new.prompt_adapter!r}, which is not loaded")
        self._check_embeds(new, soft)
        for ids in (new.prompt_token_ids, new.output_token_ids, new.encoder_token_ids):
            _require_ids(ids, limits.vocab_size, f"slot {slot}: token id")
        self._check_blocks(slot, 0, new.block_ids, self._batch.block_tables.shape[1])
        self._check_blocks(slot, 0, new.cross_block_ids, self._batch.cross_block_tables.shape[1])
        self._check_beam(new)
        for beam_slot in new.beam_slots or (slot,):
            is_first = beam_slot == slot
            self._occupied[beam_slot] = True
            self._ended[beam_slot] = False
            self._num_blocks[beam_slot] = len(new.block_ids) if is_first else 0
            self._num_tokens[beam_slot] = num_tokens
            self._num_computed_tokens[beam_slot] = new.num_computed_tokens if is_first else 0
            self._output_left[beam_slot] = new.max_tokens - len(new.output_token_ids)
            self._encoder_lens[beam_slot] = len(new.encoder_token_ids)
            self._lacks_encoder_embeds[beam_slot] = new.encoder_embeds == b""

    def _check_beam(self, new: NewRequestData) -> None:
        width = 0 if new.sampling.beam is None else new.sampling.beam.width
        slots = new.beam_slots
        _require(len(slots) == width, f"slot {new.slot} has {len(slots)} beam slots for {width} beams")
        if slots:
            _require(slots[0] == new.slot, f"slot {new.slot} is not the first of its beam slots")
            _require(len(set(slots)) == width, f"slot {new.slot} names a beam slot twice")
            _require(not new.output_token_ids, f"slot {new.slot} resumes a beam search")
            for slot in slots:
                _require(0 <= slot < self._limits.max_num_seqs, f"beam slot {slot} is outside the batch")
                _require(not self._occupied[slot], f"slot {slot} is initialised, but it is in use")

    def _check_encoder_input(self, new: NewRequestData) -> None:
        encoder_len, limit = len(new.encoder_token_ids), self._limits.max_encoder_len
        fits = 1 <= encoder_len <= limit if limit else encoder_len == 0
        _require(fits, f"slot {new.slot} has {encoder_len} encoder tokens; limit {limit}")
        needed = self._batch.blocks_for(encoder_len)
        _require(
            len(new.cross_block_ids) >= needed,
            f"slot {new.slot} has {len(new.cross_block_ids)} cross blocks, but its encoder input needs {needed}",
        )

    def _check_embeds(self, new: NewRequestData, soft: SoftPrompt | None) -> None:
        """Embeddings have to be of all the places that are computed from them, and behind virtual tokens."""
        row_bytes = 4 * self._limits.hidden_size
        for name, embeds, places, num_tokens, num_computed, of_encoder in (
            ("prompt", new.prompt_embeds, new.prompt_places, len(new.prompt_token_ids), new.num_computed_tokens, False),
            ("encoder", new.encoder_embeds, new.encoder_places, len(new.encoder_token_ids), 0, True),
        ):
            num_virtual = soft.num_tokens if soft is not None and soft.of_encoder is of_encoder else 0
            edges = [num_virtual, *(edge for place in places for edge in place), num_tokens]
            _require(edges == sorted(edges), f"slot {new.slot} has {name} places {places} of {num_tokens} tokens")
            _require(bool(places) == (embeds is not None), f"slot {new.slot} has {name} embeddings or places alone")
            if embeds is not None:
                _require(row_bytes > 0, f"slot {new.slot} has {name} embeddings, but the model takes none")
                num_rows = sum(max(0, end - max(start, num_computed)) for start, end in places)
                sizes = (num_rows * row_bytes, *((0,) if of_encoder else ()))
                _require(
                    len(embeds) in sizes,
                    f"slot {new.slot} has {len(embeds)} bytes of {name} embeddings, not {sizes[0]}",
                )

    def _grow(self, slots: Sequence[int], block_ids: Sequence[Sequence[int]]) -> None:
        for slot, ids in zip(slots, block_ids, strict=True):
            self._require_occupied(slot, "granted blocks")
            self._check_blocks(slot, int(self._num_blocks[slot]), ids, self._batch.block_tables.shape[1])
            self._num_blocks[slot] += len(ids)

    def _move_blocks(self, plan: SchedulerOutput) -> None:
        if not (plan.swapped_out or plan.swapped_in or plan.copied_blocks):
            return
        num_blocks, num_host_blocks = self._limits.num_blocks, self._limits.num_host_blocks
        swaps = (*plan.swapped_out, *plan.swapped_in)
        _require_ids([block for block, _ in swaps], num_blocks, "swap: block id")
        _require_ids([host_block for _, host_block in swaps], num_host_blocks, "swap: host block id")
        _require_ids([block for pair in plan.copied_blocks for block in pair], num_blocks, "copy: block id")
        _require_distinct([host_block for _, host_block in plan.swapped_out], "host block")
        _require_distinct([block for block, _ in plan.swapped_in], "block")
        _require_distinct([block for _, block in plan.copied_blocks], "block")

    def _encode(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._require_occupied(slot, "encoded")
            _require(self._encoder_lens[slot] > 0, f"slot {slot} is encoded, but has no encoder input")
            _require(not self._lacks_encoder_embeds[slot], f"slot {slot} is encoded, but its embeddings are missing")

    def _schedule(self, scheduled_slots: Sequence[int], num_scheduled_tokens: Sequence[int]) -> None:
        if not scheduled_slots:
            return
        for slot in scheduled_slots:
            self._require_occupied(slot, "scheduled")
        _require(len(set(scheduled_slots)) == len(scheduled_slots), "a slot is scheduled twice in one plan")
        slots, counts = np.array(scheduled_slots, np.int64), np.array(num_scheduled_tokens, np.int64)
        limit = self._limits.max_num_batched_tokens
        _require(int(counts.sum()) <= limit, f"{counts.sum()} tokens are scheduled; limit {limit}")
        going_on = ~self._ended[slots]  # rows that have ended compute nothing, whatever a plan on its way says
        slots, counts = slots[going_on], counts[going_on]
        ends = self._num_computed_tokens[slots] + counts
        lengths, capacity = self._num_tokens[slots], self._num_blocks[slots] * self._limits.block_size
        wrong = (counts < 1) | (ends > np.minimum(lengths, self._limits.max_model_len))
        for index in np.flatnonzero(wrong)[:1]:
            raise PlanError(f"slot {slots[index]} is to reach {ends[index]} of its {lengths[index]} tokens")
        for index in np.flatnonzero(ends > capacity)[:1]:
            raise PlanError(f"slot {slots[index]} is to reach {ends[index]} tokens, its blocks hold {capacity[index]}")
        for index in np.flatnonzero((ends == lengths) & (self._output_left[slots] < 1))[:1]:
            raise PlanError(f"slot {slots[index]} is to sample more than its max_tokens")

    def _require_occupied(self, slot: int, what: str) -> None:
        num_slots = self._limits.max_num_seqs
        _require(0 <= slot < num_slots and bool(self._occupied[slot]), f"slot {slot} is {what}, but it is not in use")

    def _check_blocks(self, slot: int, used: int, block_ids: Sequence[int], max_blocks: int) -> None:
        _require_ids(block_ids, self._limits.num_blocks, f"slot {slot}: block id")
        total = used + len(block_ids)
        _require(total <= max_blocks, f"slot {slot} gets {total} blocks; limit {max_blocks}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(message)


def _require_distinct(targets: Sequence[int], what: str) -> None:
    if len(set(targets)) < len(targets):
        twice = next(target for index, target in enumerate(targets) if target in targets[:index])
        raise PlanError(f"{what} {twice} is copied to twice")


def _require_ids(ids: Sequence[int], limit: int, what: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < limit):
        raise PlanError(f"{what} {next(i for i in ids if not 0 <= i < limit)} is outside [0, {limit})")
