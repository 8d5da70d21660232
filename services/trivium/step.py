"""The contract between scheduler and executor: one `SchedulerOutput` in, one `ModelRunnerOutput` out, in order.

The executor keeps a standing batch: one row per *slot*. A plan is a delta to it: slots freed, slots initialised, blocks
granted, and which rows compute how many tokens in this step. Plans carry no token that the executor has sampled itself.

Both sides derive the same facts:
* a row computes tokens [num_computed, num_computed + num_scheduled) of its sequence prompt + output;
* a row samples one token in the step that brings num_computed to the length of its sequence, and appends it;
* a row that has sampled EOS or a stop token id, where its parameters heed them, computes nothing in later plans;
* a row computes every prompt token that a plan schedules: nothing ends it before it has sampled;
* the plan's effects apply in this order: `freed_slots`, `new_requests`, `new_blocks`, `swapped_out`, `swapped_in`,
  `copied_blocks`, `encoder_slots`, rows;
* in every layer the keys and values of all rows are written before any row reads: a row may share a block that another
  row of the same plan fills.

A row with `prompt_lookup_num_tokens` may compute as many tokens more in a step that samples, as far as its blocks
reach, and then samples one token or more.

A beam-search request is a group of rows, one slot per beam, whose results are candidates: both sides choose the beams
that go on, and move block tables, by the same code (`beam_search.py`).

A block freed by the scheduler may be granted again in any *later* plan, because plans run in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium.embeds import Places
from trivium.outputs import TokenLogprobs
from trivium.params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewRequestData:
    """A row that enters the standing batch (first time, after preemption, or resumed after a crash).

    `output_token_ids` were generated before: they are output, not prompt. `sampling.seed` is set; random numbers are
    keyed by (seed, choice_index, output position). `max_tokens` is resolved: the row never has more output tokens.
    Encoder-decoder rows name their encoder input and the blocks for its cross-attention keys and values.
    beam_slots: for beam search the slots of all beams, `slot` first; the other rows begin as copies of this one.
    adapter: the name of the LoRA adapter that encoder and decoder of this row have; empty for the base model.
    prompt_adapter: the name of the soft prompt whose virtual tokens prompt or encoder input begin with; their token ids
    are placeholders, what they are the executor knows.
    prompt_places, encoder_places: positions [start, end) that are embeddings, their token ids are placeholders, too.
    prompt_embeds, encoder_embeds: not None if there are any: float32 rows of those in the prompt from
    `num_computed_tokens` on, and of all in the encoder input, if it has to be encoded.
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
    beam_slots: tuple[int, ...] = ()
    adapter: str = ""
    prompt_embeds: bytes | None = field(default=None, repr=False)
    encoder_embeds: bytes | None = field(default=None, repr=False)
    prompt_places: Places = ()
    encoder_places: Places = ()
    prompt_adapter: str = ""


@dataclass(frozen=True, slots=True)
class CachedRequestData:
    """Blocks granted to rows that are already in the batch: `block_ids[i]` are appended to the table of `slots[i]`."""

    slots: tuple[int, ...] = ()
    block_ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step's plan. `scheduled_slots[i]` computes `num_scheduled_tokens[i]` >= 1 tokens.

    `encoder_slots` run their encoder and write cross-attention blocks before any row computes. copied_blocks: pairs
    (from, to) of blocks, all read before one is written. swapped_out, swapped_in: pairs (block, host block), copied to
    and from host memory. None of the three writes to a block twice.
    """

    step: int
    scheduled_slots: tuple[int, ...] = ()
    num_scheduled_tokens: tuple[int, ...] = ()
    new_requests: tuple[NewRequestData, ...] = ()
    new_blocks: CachedRequestData = field(default_factory=CachedRequestData)
    encoder_slots: tuple[int, ...] = ()
    freed_slots: tuple[int, ...] = ()
    copied_blocks: tuple[tuple[int, int], ...] = ()
    swapped_out: tuple[tuple[int, int], ...] = ()
    swapped_in: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SlotLogprobs:
    """Log-probabilities that a row asked for: of the token it sampled, and of a piece of its prompt.

    `prompt[i]` is of the prompt token at position prompt_start + i.
    """

    slot: int
    sampled: TokenLogprobs | None = None
    prompt_start: int = 0
    prompt: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class BeamCandidates:
    """What the beams of the group of `slot` may become, best first: beam `beams[i]` followed by `token_ids[i]`.

    scores: float32 sums of log-probabilities. logprobs: one for each candidate, if asked for. stops: which candidates
    end because their last token completes a stop string.
    """

    slot: int
    scores: tuple[float, ...]
    beams: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    stops: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Tokens that a row with prompt lookup sampled in one step, at least one."""

    slot: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SlotFailure:
    """The row of `slot` cannot go on, for a reason that its client may see. It is one of the rows that sampled, or
    the first of a beam group; what it sampled means nothing, and it computes nothing in later plans."""

    slot: int
    message: str


@dataclass(frozen=True, slots=True)
class ModelRunnerOutput:
    """Result of one step: row `slots[i]` sampled `token_ids[i]`. Rows that did not sample are absent.

    logprobs: of the rows that asked for them. beams: of the groups whose beams reached the end of their sequences.
    runs: of the rows that guessed; they are not in `slots`.
    failures: of rows whose requests cannot go on.
    """

    step: int
    slots: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[SlotLogprobs, ...] = ()
    beams: tuple[BeamCandidates, ...] = ()
    runs: tuple[TokenRun, ...] = ()
    failures: tuple[SlotFailure, ...] = ()
