"""A plan while it is being made, and what is remembered of it until its result comes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trivium.scheduler.request import Request
from trivium.scheduler.running_rows import Bools, Longs, RunningRows
from trivium.step import CachedRequestData, NewRequestData, SchedulerOutput


class PlanDraft:
    """Owner: the Scheduler, for one call of `schedule`. `budget` is the number of tokens that the step may compute yet.

    Rows that decode are a mask of slots; the others have a number of tokens each.
    """

    def __init__(self, rows: RunningRows, *, budget: int, block_size: int) -> None:
        num_slots = len(rows.num_tokens)
        self.budget = budget
        self.encoder_budget = budget
        self.has_preempted = False
        self.num_embeds_bytes = 0  # that the plan carries
        self.new_requests: list[NewRequestData] = []
        self.grown: dict[int, tuple[int, ...]] = {}  # slot -> new blocks
        self.encoder_slots: list[int] = []
        self.copied_blocks: list[tuple[int, int]] = []
        self.swapped_in: list[tuple[int, int]] = []
        self._running = rows
        self._block_size = block_size
        self._decoding: Bools = np.zeros(num_slots, np.bool_)
        self._rows: dict[int, int] = {}  # slot -> number of tokens, of the rows that do not just decode
        self._samples: Bools = np.zeros(num_slots, np.bool_)
        self._filled: list[tuple[int, int]] = []
        self._filled_prompts: dict[int, tuple[Request, int]] = {}  # slot -> request, prompt tokens in its blocks
        self._prompts: dict[int, Request] = {}

    @property
    def is_empty(self) -> bool:
        return not self._rows and not self._decoding.any()

    def add_decoding(self, ready: Bools) -> None:
        """Plan a token of each slot in `ready`, which says what `RunningRows.ready_to_decode` does."""
        slots = np.flatnonzero(ready)
        self._decoding = ready
        self._samples |= ready
        self.budget -= len(slots)
        self._running.decode(slots)
        full = slots[self._running.num_computed[slots] % self._block_size == 0]
        self._filled += zip(full.tolist(), self._running.num_computed[full].tolist(), strict=True)

    def add_new_request(self, new: NewRequestData) -> None:
        self.new_requests.append(new)
        self.num_embeds_bytes += len(new.prompt_embeds or b"") + len(new.encoder_embeds or b"")

    def add_row(self, request: Request, num_tokens: int) -> None:
        """Count `num_tokens` of `request` as computed, and the token that the row samples as in flight."""
        slot, running = request.slot, self._running
        self._rows[slot] = num_tokens
        self.budget -= num_tokens
        before = int(running.num_computed[slot])
        computed = before + num_tokens
        running.num_computed[slot] = computed
        if computed == running.num_tokens[slot]:
            running.num_tokens[slot] += 1
            running.num_in_flight[slot] += 1
            self._samples[slot] = True
        if computed % self._block_size < num_tokens:
            self._filled.append((slot, computed))
            if before < request.num_prompt_tokens:
                self._filled_prompts[slot] = request, min(computed, request.num_prompt_tokens)
        if request.wants_prompt_logprobs and before < request.num_prompt_tokens:
            self._prompts[slot] = request

    def add_rows(self, slots: tuple[int, ...]) -> None:
        """Plan one token of each of `slots`, the rows of a beam search."""
        self._rows.update(dict.fromkeys(slots, 1))
        self.budget -= len(slots)

    def expect_candidates(self, slots: tuple[int, ...]) -> None:
        """The result of the plan has candidates for the beam searches that begin at `slots`."""
        self._samples[list(slots)] = True

    def drop_rows(self, request: Request, slots: tuple[int, ...]) -> None:
        """Take back the rows of a request that loses its slots."""
        decoded = int(self._decoding[request.slot])
        self._running.num_computed[request.slot] -= self._rows.get(request.slot, decoded)
        self.budget += decoded
        for slot in slots:
            self.budget += self._rows.pop(slot, 0)
            self._prompts.pop(slot, None)
            self._filled_prompts.pop(slot, None)
            self.grown.pop(slot, None)
            self._decoding[slot] = self._samples[slot] = False
        self._filled = [entry for entry in self._filled if entry[0] not in slots]

    def take_filled_prompts(self) -> list[tuple[Request, int]]:
        """Requests of rows that complete blocks of their prompts, each with the prompt tokens that are then computed.

        Those added since the last call. From then on their rows must stay in the plan.
        """
        taken = list(self._filled_prompts.values())
        self._filled_prompts.clear()
        return taken

    def to_plan(
        self, step: int, *, freed_slots: tuple[int, ...], swapped_out: tuple[tuple[int, int], ...]
    ) -> SchedulerOutput:
        decoding = np.flatnonzero(self._decoding).tolist()
        return SchedulerOutput(
            step=step,
            scheduled_slots=(*decoding, *self._rows),
            num_scheduled_tokens=(*(1,) * len(decoding), *self._rows.values()),
            new_requests=tuple(self.new_requests),
            new_blocks=CachedRequestData(slots=tuple(self.grown), block_ids=tuple(self.grown.values())),
            encoder_slots=tuple(self.encoder_slots),
            freed_slots=freed_slots,
            copied_blocks=tuple(self.copied_blocks),
            swapped_out=swapped_out,
            swapped_in=tuple(self.swapped_in),
        )

    def to_plan_in_flight(self, step: int) -> PlanInFlight:
        return PlanInFlight(step, self._running.generation.copy(), self._samples, self._filled, self._prompts)


@dataclass(frozen=True, slots=True)
class PlanInFlight:
    """A plan that has no result yet. What it says of a slot is void once the slot's generation is another one.

    samples: slots that the result has a token or candidates for. filled: (slot, tokens computed) of rows that complete
    a block, which others may share once the plan is acknowledged, if they do not yet. prompts: slot -> request of the
    rows that compute prompt tokens for their log-probabilities.
    """

    step: int
    generation: Longs
    samples: Bools
    filled: list[tuple[int, int]] = field(repr=False)
    prompts: dict[int, Request] = field(repr=False)

    def is_current(self, slot: int, rows: RunningRows) -> bool:
        """Whether `slot` still has the request that this plan samples for. A slot it does not sample is a bug."""
        assert self.samples[slot], f"step {self.step} samples nothing in slot {slot}"
        return bool(self.generation[slot] == rows.generation[slot])
