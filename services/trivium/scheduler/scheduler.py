"""Decides what each step computes. Pure: no clock, no I/O, no asyncio, no torch.

There is no prefill and no decode phase: a request's `num_computed_tokens` catches up with its `num_tokens`. Plans may
be issued before the results of earlier ones have come (`max_plans_in_flight`): a token in flight belongs to its
sequence, its value stays with the executor.

Order of effects in `schedule`: running requests get tokens and blocks in order of arrival; one that cannot get a block
preempts the youngest running request; if nobody was preempted, waiting requests are admitted while tokens, slots and
blocks last.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from trivium.config import ModelInfo
from trivium.errors import InvalidRequestError
from trivium.outputs import FinishReason
from trivium.scheduler.kv_cache_manager import KVCacheManager
from trivium.scheduler.request import Request, RequestStatus
from trivium.scheduler.request_queue import RequestQueue
from trivium.step import CachedRequestData, ModelRunnerOutput, NewRequestData, SchedulerOutput


@dataclass(frozen=True, slots=True)
class RequestUpdate:
    """What a result did to one request: the tokens it brought; `request.finish_reason` is set if it ended."""

    request: Request
    new_token_ids: tuple[int, ...]


@dataclass(slots=True)
class _PlanDraft:
    """A plan being built. `budget` is the number of tokens that the step may still compute."""

    budget: int
    encoder_budget: int
    rows: dict[int, int] = field(default_factory=dict)  # slot -> number of tokens
    requests: dict[int, Request] = field(default_factory=dict)  # slot -> Request
    new_requests: list[NewRequestData] = field(default_factory=list)
    grown: dict[int, tuple[int, ...]] = field(default_factory=dict)  # slot -> new blocks
    encoder_slots: list[int] = field(default_factory=list)
    has_preempted: bool = False

    def add_row(self, request: Request, num_tokens: int) -> None:
        self.rows[request.slot] = num_tokens
        self.requests[request.slot] = request
        self.budget -= num_tokens

    def drop_row(self, request: Request) -> None:
        """Take back the row of a request that was planned in this step and is preempted now."""
        self.budget += self.rows.pop(request.slot, 0)
        self.requests.pop(request.slot, None)
        self.grown.pop(request.slot, None)


@dataclass(frozen=True, slots=True)
class _PlanInFlight:
    """What a plan that has no result yet will sample: slot -> (request, its incarnation when the plan was made)."""

    step: int
    sampling: dict[int, tuple[Request, int]]


class Scheduler:
    """Owner of all requests, the queue and the KV cache manager. Used from one thread only."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.num_preemptions = 0
        self._eos_token_ids = frozenset(info.eos_token_ids)
        self._kv_cache = KVCacheManager(info.num_blocks, info.block_size)
        self._waiting = RequestQueue()
        self._running: dict[int, Request] = {}  # key -> Request, in order of arrival
        self._free_slots: deque[int] = deque(range(info.max_num_seqs))
        self._freed_slots: list[int] = []  # told to the executor with the next plan
        self._in_flight: deque[_PlanInFlight] = deque()
        self._step = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_plans_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_held_blocks(self) -> int:
        return self._kv_cache.num_blocks - self._kv_cache.num_free_blocks

    def check_admission(self, request: Request) -> None:
        """Raise InvalidRequestError, with both numbers, if `request` could not run even alone."""
        if not self._kv_cache.can_ever_fit(request):
            raise InvalidRequestError(
                f"the request may need {self._kv_cache.max_blocks_of(request)} KV blocks of "
                f"{self._kv_cache.block_size} tokens, the server has {self._kv_cache.num_blocks}",
                param="max_tokens",
                code="exceeds_kv_capacity",
            )

    def add_request(self, request: Request) -> None:
        """Queue `request`, or finish it at once if its resumed output is complete already."""
        reason = request.check_stop(self._eos_token_ids)
        if reason is not None:
            request.status, request.finish_reason = RequestStatus.FINISHED, reason
            return
        self._waiting.push(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End `request` now (abort, or a stop string that only its text shows); the next plan may use its blocks."""
        if request.is_finished:
            return
        if request in self._waiting:
            self._waiting.remove(request)
        else:
            self._release(request)
        request.status, request.finish_reason = RequestStatus.FINISHED, reason

    def requeue_all(self) -> None:
        """The executor lost its state: running requests wait again, ahead of the others, with their output so far."""
        self._in_flight.clear()
        for request in reversed(list(self._running.values())):
            self._requeue(request)
        self._freed_slots.clear()

    def schedule(self) -> SchedulerOutput | None:
        """The next plan, or None if there is nothing to compute until a result or a request comes."""
        draft = self._new_draft()
        self._schedule_running(draft)
        if draft.has_preempted and not draft.rows:
            draft = self._new_draft()  # the last running request gave up its blocks: start over with what is free
        if not draft.has_preempted:
            self._schedule_waiting(draft)
        return self._issue(draft) if draft.rows else None

    def update_from_output(self, output: ModelRunnerOutput) -> list[RequestUpdate]:
        """Apply the result of the oldest plan in flight. Rows of requests that are gone are dropped."""
        plan = self._in_flight.popleft()
        assert plan.step == output.step, f"result of step {output.step}, expected {plan.step}"
        updates = []
        for slot, token_id in zip(output.slots, output.token_ids, strict=True):
            request, incarnation = plan.sampling[slot]
            if request.is_finished or request.incarnation != incarnation:
                continue
            request.num_tokens_in_flight -= 1
            request.output_token_ids.append(token_id)
            reason = request.check_stop(self._eos_token_ids)
            if reason is not None:
                self.finish(request, reason)
            updates.append(RequestUpdate(request, (token_id,)))
        return updates

    def check_invariants(self) -> None:
        """Recompute everything that can be derived."""
        self._kv_cache.check_invariants()
        slots = [request.slot for request in self._running.values()]
        assert sorted([*slots, *self._free_slots]) == list(range(self.info.max_num_seqs)), "slots lost or shared"
        assert set(self._freed_slots) <= set(range(self.info.max_num_seqs)), "freed slot out of range"
        for request in self._running.values():
            assert request.status is RequestStatus.RUNNING, f"request {request.key} runs as {request.status}"
            assert request.num_computed_tokens <= request.num_tokens, f"request {request.key} computed too much"
            planned = sum(plan.sampling.get(request.slot) == (request, request.incarnation) for plan in self._in_flight)
            assert planned == request.num_tokens_in_flight, f"request {request.key}: wrong number in flight"
        for request in self._waiting:
            assert request.slot == -1 and request.num_computed_tokens == 0, f"request {request.key} waits with a slot"
        if not self._running:
            assert self.num_held_blocks == 0, "blocks are held though nothing runs"

    def _new_draft(self) -> _PlanDraft:
        return _PlanDraft(budget=self.info.max_num_batched_tokens, encoder_budget=self.info.max_num_batched_tokens)

    def _schedule_running(self, draft: _PlanDraft) -> None:
        for request in list(self._running.values()):
            if draft.budget == 0:
                break
            if request.status is not RequestStatus.RUNNING:  # preempted for an earlier one in this very loop
                continue
            num_tokens = min(request.num_tokens_to_compute, draft.budget)
            if num_tokens == 0:
                continue
            blocks = self._allocate_or_preempt(request, num_tokens, draft)
            if blocks is None:
                continue
            draft.add_row(request, num_tokens)
            if blocks:
                draft.grown[request.slot] = blocks

    def _allocate_or_preempt(self, request: Request, num_tokens: int, draft: _PlanDraft) -> tuple[int, ...] | None:
        """Blocks for `request`, taken from the youngest requests if need be; None if it was preempted itself."""
        while (blocks := self._kv_cache.allocate_slots(request, num_tokens)) is None:
            victim = next(reversed(self._running.values()))
            draft.drop_row(victim)
            draft.has_preempted = True
            self._preempt(victim)
            if victim is request:
                return None
        return blocks

    def _schedule_waiting(self, draft: _PlanDraft) -> None:
        while self._waiting and self._free_slots and draft.budget > 0:
            request = self._waiting.peek()
            num_encoder = len(request.encoder_token_ids)
            if num_encoder > draft.encoder_budget and draft.encoder_slots:
                break  # one encoder input may exceed the budget, but only alone
            num_tokens = min(request.num_tokens, draft.budget)
            blocks = self._kv_cache.allocate_first(request, num_tokens)
            if blocks is None:
                break
            self._waiting.remove(request)
            self._start(request, draft, blocks)
            draft.add_row(request, num_tokens)
            draft.encoder_budget -= num_encoder

    def _start(self, request: Request, draft: _PlanDraft, blocks: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        request.slot = self._free_slots.popleft()
        request.status = RequestStatus.RUNNING
        self._running[request.key] = request
        draft.new_requests.append(
            NewRequestData(
                slot=request.slot,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=tuple(request.output_token_ids),
                num_computed_tokens=0,
                block_ids=blocks[0],
                sampling=request.sampling,
                choice_index=request.choice_index,
                max_tokens=request.max_tokens,
                encoder_token_ids=request.encoder_token_ids,
                cross_block_ids=blocks[1],
            )
        )
        if request.encoder_token_ids:
            draft.encoder_slots.append(request.slot)

    def _issue(self, draft: _PlanDraft) -> SchedulerOutput:
        self._step += 1
        sampling: dict[int, tuple[Request, int]] = {}
        for slot, num_tokens in draft.rows.items():
            request = draft.requests[slot]
            request.num_computed_tokens += num_tokens
            if request.num_computed_tokens == request.num_tokens:
                request.num_tokens_in_flight += 1
                sampling[slot] = (request, request.incarnation)
        self._in_flight.append(_PlanInFlight(self._step, sampling))
        freed, self._freed_slots = tuple(self._freed_slots), []
        return SchedulerOutput(
            step=self._step,
            scheduled_slots=tuple(draft.rows),
            num_scheduled_tokens=tuple(draft.rows.values()),
            new_requests=tuple(draft.new_requests),
            new_blocks=CachedRequestData(slots=tuple(draft.grown), block_ids=tuple(draft.grown.values())),
            encoder_slots=tuple(draft.encoder_slots),
            freed_slots=freed,
        )

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        request.num_preemptions += 1
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        self._release(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_tokens_in_flight = 0
        self._waiting.push_front(request)

    def _release(self, request: Request) -> None:
        """Take slot and blocks from a running request. Tokens in flight for it are void from now on."""
        del self._running[request.key]
        self._kv_cache.free(request)
        self._freed_slots.append(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1
        request.incarnation += 1
