"""How far the running requests are, as one array per fact: a step moves ten thousand of them in a few operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from trivium.scheduler.request import Request

Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_NEVER = np.iinfo(np.int64).max


class RunningRows:
    """Owner: the Scheduler. Arrays of one element per slot; a beam search is counted in its first slot.

    | array | what it says of the request in the slot |
    |---|---|
    | num_computed | tokens computed, or planned to be |
    | num_tokens | length of its sequence, tokens in flight included |
    | num_in_flight | tokens that a plan samples and no result has brought yet |
    | room | tokens that its blocks have room for |
    | end | length of the sequence with its last output token |
    | decodes_from | from how many computed tokens on its row is one token a step; never for beams and lookup |
    | eos_from | from which length on an EOS token ends it; never if it does not heed EOS |
    | is_watched | its tokens must be looked at one by one: stop tokens, or choices that wait for its prompt |
    | generation | how many requests have left the slot: results of older plans are void |

    A free slot never decodes and is past its end.
    """

    def __init__(self, num_slots: int) -> None:
        def longs(value: int = 0) -> Longs:
            return np.full(num_slots, value, np.int64)

        self.num_computed = longs()
        self.num_tokens = longs()
        self.num_in_flight = longs()
        self.room = longs()
        self.end = longs()
        self.decodes_from = longs(_NEVER)
        self.eos_from = longs(_NEVER)
        self.is_watched: Bools = np.zeros(num_slots, np.bool_)
        self.generation = longs()
        self._started = longs()  # number of the start: rows are planned in this order
        self._num_started = 0
        self._requests: list[Request | None] = [None] * num_slots

    def start(self, request: Request, slots: tuple[int, ...], num_computed: int, room: int) -> None:
        """`request` has `slots`, the first of which counts, and blocks for `room` tokens."""
        slot = slots[0]
        for each in slots:
            self._requests[each] = request
        self._num_started += 1
        self._started[slot] = self._num_started
        self.num_computed[slot] = num_computed
        self.num_tokens[slot] = request.num_tokens
        self.num_in_flight[slot] = 0
        self.room[slot] = room
        self.end[slot] = request.num_prompt_tokens + request.max_tokens
        if request.is_plain:
            self.decodes_from[slot] = request.num_prompt_tokens
        if request.sampling.heeds_eos:
            self.eos_from[slot] = request.num_prompt_tokens + request.sampling.min_tokens_to_eos
        self.watch(request)

    def watch(self, request: Request) -> None:
        """See `is_watched`: `request` has siblings now, or has none any more."""
        self.is_watched[request.slot] = bool(request.sampling.stop_token_ids) or bool(request.siblings)

    def free(self, slots: tuple[int, ...]) -> None:
        for slot in slots:
            self._requests[slot] = None
            self.generation[slot] += 1
        first = slots[0]
        self.num_computed[first] = self.num_tokens[first] = self.num_in_flight[first] = 0
        self.room[first] = self.end[first] = 0
        self.decodes_from[first] = self.eos_from[first] = _NEVER
        self.is_watched[first] = False

    def request_in(self, slot: int) -> Request:
        """The request that runs in `slot`."""
        request = self._requests[slot]
        assert request is not None, f"nothing runs in slot {slot}"
        return request

    def requests_in(self, slots: Longs) -> list[Request]:
        """The requests that run in `slots`, none of which is free."""
        requests = cast("list[Request]", self._requests)
        return [requests[slot] for slot in slots.tolist()]

    def ready_to_decode(self) -> Bools:
        """Of each slot, whether its row computes one more token of its output and has room for it."""
        ready: Bools = self.num_computed >= self.decodes_from
        ready &= self.num_tokens - self.num_computed == 1
        ready &= self.num_tokens < self.end
        ready &= self.num_computed < self.room
        return ready

    def others_to_plan(self, planned: Bools) -> Iterator[Request]:
        """Requests outside `planned` that have tokens to compute and are not at their end, in order of their start."""
        slots = np.flatnonzero(~planned & (self.num_tokens > self.num_computed) & (self.num_tokens < self.end))
        for slot in slots[np.argsort(self._started[slots])].tolist():
            request = self._requests[slot]
            if request is not None:  # it was not preempted for one before it
                yield request

    def decode(self, slots: Longs) -> None:
        """The rows of `slots` are planned: one token each is computed, and one sampled."""
        self.num_computed[slots] += 1
        self.num_tokens[slots] += 1
        self.num_in_flight[slots] += 1

    def take_tokens(self, slots: Longs, token_ids: Longs, eos_token_ids: Longs) -> Bools:
        """The tokens in flight of `slots` are here. Which of them may end their request, or must be looked at."""
        self.num_in_flight[slots] -= 1
        lengths = self.num_tokens[slots] - self.num_in_flight[slots]
        may_end: Bools = (lengths >= self.end[slots]) | self.is_watched[slots]
        for eos_token_id in eos_token_ids.tolist():
            may_end |= (token_ids == eos_token_id) & (lengths >= self.eos_from[slots])
        return may_end

    def take_run(self, slot: int, num_taken: int) -> None:
        """The row of `slot` has guessed: instead of one token in flight, `num_taken` are here, all but one computed."""
        self.num_in_flight[slot] -= 1
        self.num_tokens[slot] += num_taken - 1
        self.num_computed[slot] += num_taken - 1

    def check_invariants(self) -> None:
        """What the arrays say against what the requests say."""
        for slot, request in enumerate(self._requests):
            if request is None:
                assert self.decodes_from[slot] == _NEVER and self.end[slot] == 0, f"free slot {slot} may be planned"
            elif request.slot == slot:
                known = self.num_tokens[slot] - self.num_in_flight[slot]
                assert known == request.num_tokens, f"slot {slot}: {known} tokens known"
                assert self.num_in_flight[slot] >= 0, f"slot {slot}: fewer than no tokens in flight"
                assert self.end[slot] == request.num_prompt_tokens + request.max_tokens, f"slot {slot}: wrong end"
                assert self.is_watched[slot] or not request.siblings, f"slot {slot}: siblings are not watched"
