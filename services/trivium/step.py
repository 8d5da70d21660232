"""The contract between scheduler and executor: one `SchedulerOutput` in, one `ModelRunnerOutput` out, in order.

The executor keeps a standing batch: one row per *slot*. A plan is a delta to it: slots freed, slots initialised, blocks
granted, and which rows compute how many tokens in this step. Plans carry no token that the executor has sampled itself.

Both sides derive the same facts:
* a row computes tokens [num_computed, num_computed + num_scheduled) of its sequence prompt + output;
* a row samples one token in the step that brings num_computed to the length of its sequence, and appends it;
* a row that has sampled EOS or a stop token id, where its parameters heed them, computes nothing in later plans;
* the plan's effects apply in this order: `freed_slots`, `new_requests`, `new_blocks`, `encoder_slots`, rows.

A block freed by the scheduler may be granted again in any *later* plan, because plans run in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium.params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewRequestData:
    """A row that enters the standing batch (first time, after preemption, or resumed after a crash).

    `output_token_ids` were generated before: they are output, not prompt. `sampling.seed` is set; random numbers are
    keyed by (seed, choice_index, output position). `max_tokens` is resolved: the row never has more output tokens.
    Encoder-decoder rows name their encoder input and the blocks for its cross-attention keys and values.
    """

    slot: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    num_computed_tokens: int
    block_ids: tuple[int, ...]
    sampling: SamplingParams
    choice_index: int
    max_tokens: int
    encoder_token_ids: tuple[int, ...] = ()
    cross_block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CachedRequestData:
    """Blocks granted to rows that are already in the batch: `block_ids[i]` are appended to the table of `slots[i]`."""

    slots: tuple[int, ...] = ()
    block_ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step's plan. `scheduled_slots[i]` computes `num_scheduled_tokens[i]` >= 1 tokens.

    `encoder_slots` run their encoder and write cross-attention blocks before any row computes.
    """

    step: int
    scheduled_slots: tuple[int, ...] = ()
    num_scheduled_tokens: tuple[int, ...] = ()
    new_requests: tuple[NewRequestData, ...] = ()
    new_blocks: CachedRequestData = field(default_factory=CachedRequestData)
    encoder_slots: tuple[int, ...] = ()
    freed_slots: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelRunnerOutput:
    """Result of one step: row `slots[i]` sampled `token_ids[i]`. Rows that did not sample are absent."""

    step: int
    slots: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
