"""The standing batch: one row per slot in persistent arrays, changed only by plans.

Owns what the executor remembers between steps. A plan is checked as a whole (`plan_check.py`) before anything changes;
then it is applied in the contract's order: freed slots, new requests, granted blocks. The runner advances rows after
the step with `advance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trivium.embeds import Places
from trivium.executor.models.model import NOT_A_TOKEN
from trivium.executor.slot_embeds import SlotEmbeds
from trivium.executor.soft_prompt import SoftPrompt
from trivium.params import SamplingParams
from trivium.step import NewRequestData, SchedulerOutput

Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

UNKNOWN = -2


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds that every plan is held to. max_encoder_len is 0 for decoder-only models, num_host_blocks without swap."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_encoder_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    num_host_blocks: int = 0
    hidden_size: int = 0  # of prompt embeddings; 0: the model takes none


@dataclass(frozen=True, slots=True)
class ScheduledRows:
    """The rows of one step in packing order: rows with one token first, shorter contexts first.

    slots, num_tokens: [num_rows]. token_slots, positions: [num_tokens], each token's slot and place in its sequence.
    """

    slots: Longs
    num_tokens: Longs
    token_slots: Longs
    positions: Longs


def edits_logits(params: SamplingParams) -> bool:
    """Whether `logits_processors.edit_logits` has something to do for `params` once `min_tokens` is reached."""
    return bool(
        params.logit_bias
        or params.allowed_token_ids
        or params.bad_words_token_ids
        or params.no_repeat_ngram_size
        or params.encoder_no_repeat_ngram_size
        or params.suppress_tokens
        or params.begin_suppress_tokens
        or params.repetition_penalty != 1.0
        or params.encoder_repetition_penalty != 1.0
        or params.frequency_penalty
        or params.presence_penalty
        or params.dry_multiplier
    )


def is_plain(params: SamplingParams) -> bool:
    """Whether a row's next token follows from logits, temperature, top-k, top-p and min-p, and is all it reports."""
    return not (
        edits_logits(params)
        or truncates(params)
        or params.xtc_probability
        or params.beam is not None
        or params.num_lookup_tokens
        or params.structured_outputs is not None
        or params.logprobs is not None
        or params.prompt_logprobs is not None
    )


def truncates(params: SamplingParams) -> bool:
    """Whether `truncation.truncate` has something to do for `params`."""
    return bool(params.typical_p < 1.0 or params.top_a or params.epsilon_cutoff or params.eta_cutoff)


class SamplingColumns:
    """How each slot samples: one array per parameter that many rows use, [max_num_seqs]; the others are in `params`.

    edits_logits, truncates: whether a row has any of the parameters of `logits_processors.py` and `truncation.py`.
    is_plain: whether it has none of the rarer ones at all.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.temperature = np.zeros(max_num_seqs, np.float32)  # 0 is greedy
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int64)  # 0 keeps all
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.seed = np.zeros(max_num_seqs, np.int64)
        self.choice_index = np.zeros(max_num_seqs, np.int64)
        self.min_tokens = np.zeros(max_num_seqs, np.int64)
        self.max_tokens = np.zeros(max_num_seqs, np.int64)
        self.ignore_eos = np.zeros(max_num_seqs, np.bool_)
        self.min_tokens_to_eos = np.zeros(max_num_seqs, np.int64)
        self.xtc_threshold = np.zeros(max_num_seqs, np.float64)
        self.xtc_probability = np.zeros(max_num_seqs, np.float64)
        self.edits_logits = np.zeros(max_num_seqs, np.bool_)
        self.truncates = np.zeros(max_num_seqs, np.bool_)
        self.is_plain = np.zeros(max_num_seqs, np.bool_)
        self.is_beam = np.zeros(max_num_seqs, np.bool_)
        self.num_lookup_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_logprobs = np.full(max_num_seqs, -1, np.int64)  # -1: none are asked for
        self.num_prompt_logprobs = np.full(max_num_seqs, -1, np.int64)
        self.params: list[SamplingParams] = [SamplingParams()] * max_num_seqs

    def set(self, slot: int, new: NewRequestData) -> None:
        params = new.sampling
        self.temperature[slot] = 0.0 if params.is_greedy else params.temperature
        self.top_p[slot] = params.top_p
        self.top_k[slot] = params.top_k
        self.min_p[slot] = params.min_p
        self.seed[slot] = params.seed or 0
        self.choice_index[slot] = new.choice_index
        self.min_tokens[slot] = params.min_tokens
        self.max_tokens[slot] = new.max_tokens
        self.ignore_eos[slot] = not params.heeds_eos
        self.min_tokens_to_eos[slot] = params.min_tokens_to_eos
        self.xtc_threshold[slot] = params.xtc_threshold
        self.xtc_probability[slot] = params.xtc_probability
        self.edits_logits[slot] = edits_logits(params)
        self.truncates[slot] = truncates(params)
        self.is_plain[slot] = is_plain(params)
        self.is_beam[slot] = params.beam is not None
        self.num_lookup_tokens[slot] = params.num_lookup_tokens
        self.num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        # Choice 0 reports for all choices, and the first beam for all beams.
        of_prompt = params.prompt_logprobs if new.choice_index == 0 and slot == new.slot else None
        self.num_prompt_logprobs[slot] = -1 if of_prompt is None else of_prompt
        self.params[slot] = params


class InputBatch:
    """Owned by the ModelRunner, and touched only by its thread.

    Rows of a slot that is not `occupied` mean nothing. Arrays are public for reading. Token ids of what has none, an
    embedding or a virtual token of a soft prompt, are NOT_A_TOKEN; of what is still on the device, UNKNOWN.
    """

    def __init__(
        self,
        limits: BatchLimits,
        adapter_indices: Mapping[str, int] | None = None,
        soft_prompts: Mapping[str, SoftPrompt] | None = None,
    ) -> None:
        self.limits = limits
        self.adapter_indices = adapter_indices if adapter_indices is not None else {}  # name -> 1, 2, ...
        self.soft_prompts = soft_prompts if soft_prompts is not None else {}  # name -> what is loaded
        num_slots = limits.max_num_seqs
        self.occupied = np.zeros(num_slots, np.bool_)
        self.ended = np.zeros(num_slots, np.bool_)  # sampled EOS or a stop token: computes nothing more
        self.token_ids = np.zeros((num_slots, limits.max_model_len), np.int32)
        self.num_prompt_tokens = np.zeros(num_slots, np.int64)
        self.num_tokens = np.zeros(num_slots, np.int64)  # prompt and output
        self.num_computed_tokens = np.zeros(num_slots, np.int64)
        self.num_blocks = np.zeros(num_slots, np.int64)
        self.block_tables = np.zeros((num_slots, self.blocks_for(limits.max_model_len)), np.int32)
        self.encoder_lens = np.zeros(num_slots, np.int64)
        self.encoder_token_ids: list[Longs] = [np.zeros(0, np.int64)] * num_slots
        self.num_leading = np.zeros(num_slots, np.int64)  # tokens without an id that the prompt begins with
        self.num_virtual_tokens = np.zeros(num_slots, np.int64)  # of these, those of a soft prompt
        self.prefix_lens = np.zeros(num_slots, np.int64)  # of these, those whose keys and values are given
        self.prefixes: dict[int, Tensor] = {}  # slot -> those, as of SoftPrompt
        self.soft_encoders: dict[int, SoftPrompt] = {}  # slot -> what its encoder input begins with
        self.embeds = SlotEmbeds(limits.hidden_size)
        self.encoder_embeds = SlotEmbeds(limits.hidden_size)
        self.cross_block_tables = np.zeros((num_slots, self.blocks_for(limits.max_encoder_len)), np.int32)
        self.generations = np.zeros(num_slots, np.int64)  # how often the slot has been initialised
        self.adapters = np.zeros(num_slots, np.int64)  # index of the row's adapter, 0 for none
        self.sampling = SamplingColumns(num_slots)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def apply(self, plan: SchedulerOutput) -> None:
        """Free, initialise and grow rows. The plan must have passed `check_plan`."""
        self.occupied[list(plan.freed_slots)] = False
        self.embeds.drop(plan.freed_slots)
        self.encoder_embeds.drop(plan.freed_slots)
        for slot in plan.freed_slots:
            self.prefixes.pop(slot, None)
            self.soft_encoders.pop(slot, None)
        for new in plan.new_requests:
            for slot in new.beam_slots or (new.slot,):
                self._init_row(slot, new)
        for slot, block_ids in zip(plan.new_blocks.slots, plan.new_blocks.block_ids, strict=True):
            start = self.num_blocks[slot]
            self.block_tables[slot, start : start + len(block_ids)] = block_ids
            self.num_blocks[slot] += len(block_ids)

    def schedule_rows(self, plan: SchedulerOutput) -> ScheduledRows:
        """The plan's rows that have not ended, in packing order, with the position of each of their tokens."""
        slots = np.array(plan.scheduled_slots, np.int64)
        counts = np.array(plan.num_scheduled_tokens, np.int64)
        going_on = ~self.ended[slots]
        return self.pack_rows(slots[going_on], counts[going_on])

    def pack_rows(self, slots: Longs, counts: Longs) -> ScheduledRows:
        """Rows that compute `counts` tokens each, in packing order."""
        order = np.lexsort((self.num_computed_tokens[slots], counts > 1))
        slots, counts = slots[order], counts[order]
        starts = self.num_computed_tokens[slots]
        if counts.sum() == len(slots):
            return ScheduledRows(slots, counts, slots, starts)
        first_token = np.cumsum(counts) - counts
        positions = np.arange(counts.sum()) + np.repeat(starts - first_token, counts)
        return ScheduledRows(slots, counts, np.repeat(slots, counts), positions)

    def slot_mapping(self, rows: ScheduledRows) -> Longs:
        """[num_tokens] where each token's key and value go: block * block_size + offset."""
        return self.slot_mapping_of(rows.token_slots, rows.positions)

    def slot_mapping_of(self, slots: Longs | int, positions: Longs) -> Longs:
        """The same for `positions` of `slots`, or of one slot."""
        block_size = self.limits.block_size
        blocks = self.block_tables[slots, positions // block_size].astype(np.int64)
        mapping: Longs = blocks * block_size + positions % block_size
        return mapping

    def num_own_tokens(self, slots: Longs) -> Longs:
        """[num_slots] lengths of the sequences as their clients count: without virtual tokens."""
        return self.num_tokens[slots] - self.num_virtual_tokens[slots]

    def cross_slot_mapping(self, slot: int) -> Longs:
        """[encoder_len] where the slot's encoder output goes."""
        block_size = self.limits.block_size
        positions = np.arange(self.encoder_lens[slot])
        blocks = self.cross_block_tables[slot, positions // block_size].astype(np.int64)
        mapping: Longs = blocks * block_size + positions % block_size
        return mapping

    def rows_that_sample(self, rows: ScheduledRows) -> Bools:
        """[num_rows] True where this step reaches the end of the row's sequence."""
        at_end: Bools = self.num_computed_tokens[rows.slots] + rows.num_tokens == self.num_tokens[rows.slots]
        return at_end

    def advance(self, rows: ScheduledRows) -> None:
        """Count the step's tokens as computed."""
        self.num_computed_tokens[rows.slots] += rows.num_tokens
        if self.embeds:
            self.embeds.drop(
                slot for slot in rows.slots.tolist() if self.num_computed_tokens[slot] >= self.num_prompt_tokens[slot]
            )

    def append_tokens(self, slots: Longs, token_ids: Longs) -> None:
        """Append one token to each row of `slots`."""
        ends = self.num_tokens[slots]
        fits = ends < self.limits.max_model_len  # the last token of a full row is never computed, so need not be kept
        self.token_ids[slots[fits], ends[fits]] = token_ids[fits]
        self.num_tokens[slots] += 1

    def check_invariants(self) -> None:
        """Recompute what must hold for every occupied row; AssertionError names the slot."""
        for slot in np.flatnonzero(self.occupied):
            computed, tokens = self.num_computed_tokens[slot], self.num_tokens[slot]
            assert 0 <= computed <= tokens, f"slot {slot}: {computed} of {tokens} tokens computed"
            assert tokens <= self.limits.max_model_len + 1, f"slot {slot}: {tokens} tokens"
            assert computed <= self.num_blocks[slot] * self.limits.block_size, f"slot {slot}: too few blocks"
            output = tokens - self.num_prompt_tokens[slot]
            assert 0 <= output <= self.sampling.max_tokens[slot], f"slot {slot}: {output} output tokens"

    def _init_row(self, slot: int, new: NewRequestData) -> None:
        """Fill the row of `slot`. Beams other than the first begin without blocks."""
        soft = self.soft_prompts[new.prompt_adapter] if new.prompt_adapter else None
        num_virtual = soft.num_tokens if soft is not None and not soft.of_encoder else 0
        num_encoder_virtual = soft.num_tokens if soft is not None and soft.of_encoder else 0
        token_ids = _marked(new.prompt_token_ids + new.output_token_ids, num_virtual, new.prompt_places)
        block_ids = new.block_ids if slot == new.slot else ()
        self.occupied[slot] = True
        self.generations[slot] += 1
        self.ended[slot] = False
        self.token_ids[slot, : len(token_ids)] = token_ids
        self.num_leading[slot] = _count_leading(token_ids)
        self.num_virtual_tokens[slot] = num_virtual
        self.prefix_lens[slot] = 0
        self.num_prompt_tokens[slot] = len(new.prompt_token_ids)
        self.num_tokens[slot] = len(token_ids)
        self.num_computed_tokens[slot] = new.num_computed_tokens if slot == new.slot else 0
        self.num_blocks[slot] = len(block_ids)
        self.block_tables[slot, : len(block_ids)] = block_ids
        self.encoder_lens[slot] = len(new.encoder_token_ids)
        self.encoder_token_ids[slot] = _marked(new.encoder_token_ids, num_encoder_virtual, new.encoder_places)
        if slot == new.slot:  # the other beams compute nothing of the prompt
            self._put_embeds(slot, new, soft)
        self.cross_block_tables[slot, : len(new.cross_block_ids)] = new.cross_block_ids
        self.adapters[slot] = self.adapter_indices[new.adapter] if new.adapter else 0
        self.sampling.set(slot, new)

    def _put_embeds(self, slot: int, new: NewRequestData, soft: SoftPrompt | None) -> None:
        """Keep what takes the place of tokens, as far as it has to be computed."""
        if soft is not None and soft.of_encoder:
            self.soft_encoders[slot] = soft
        elif soft is not None and soft.keys_values is not None:
            self.prefixes[slot], self.prefix_lens[slot] = soft.keys_values, soft.num_tokens
        elif soft is not None and soft.rows is not None and new.num_computed_tokens < soft.num_tokens:
            self.embeds.put(slot, soft.rows)
        if new.prompt_embeds:
            self.embeds.put_places(slot, new.prompt_embeds, new.prompt_places, start=new.num_computed_tokens)
        if new.encoder_embeds:
            self.encoder_embeds.put_places(slot, new.encoder_embeds, new.encoder_places)


def _marked(token_ids: Sequence[int], num_virtual: int, places: Places) -> Longs:
    """[len(token_ids)] the ids, NOT_A_TOKEN for placeholders."""
    marked = np.array(token_ids, np.int64)
    for start, end in ((0, num_virtual), *places):
        marked[start:end] = NOT_A_TOKEN
    return marked


def _count_leading(token_ids: Longs) -> int:
    is_token = token_ids != NOT_A_TOKEN
    return int(is_token.argmax()) if is_token.any() else len(token_ids)
