"""Decides what each step computes. Pure: no clock, no I/O, no asyncio, no torch.

There is no prefill and no decode phase: a request's `num_computed_tokens` catches up with its `num_tokens`. Plans may
be issued before the results of earlier ones have come (`max_plans_in_flight`): a token in flight belongs to its
sequence, its value stays with the executor.

Order of effects in `schedule`: running requests get tokens and blocks in the order in which they started; one that
cannot get a block preempts the running request that is last in the queue's order; if nobody was preempted, waiting
requests are admitted while tokens, slots and blocks last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from trivium.beam_search import BeamNode
from trivium.config import ModelInfo
from trivium.errors import InvalidRequestError
from trivium.inputs import MAX_EMBEDS_BYTES
from trivium.outputs import FinishReason, TokenLogprobs
from trivium.params import SamplingParams
from trivium.scheduler.beam_group import BeamGroup
from trivium.scheduler.kv_cache_manager import Allocation, KVCacheManager
from trivium.scheduler.request import ForkPoint, Request, RequestStatus
from trivium.scheduler.request_queue import RequestQueue
from trivium.step import (
    BeamCandidates,
    CachedRequestData,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
    SlotFailure,
    TokenRun,
)


@dataclass(slots=True)
class RequestUpdate:
    """What a result did to one request: the tokens it brought; `request.finish_reason` is set if it ended.

    logprobs: one for each new token, if the request asked for them. failure: why the request cannot go on.

    A value, not frozen: each running request gets one per step, and a frozen one takes three times as long to make.
    """

    request: Request
    new_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    failure: str | None = None


@dataclass(slots=True)
class _PlanDraft:
    """A plan being built. `budget` is the number of tokens that the step may still compute.

    sampling: slot -> (request, its incarnation) of the rows that will sample. filled: (request, incarnation, tokens
    computed) of the rows that complete a block, which others may share once the plan is acknowledged. prompts: slot ->
    request of the rows that compute prompt tokens for their log-probabilities.
    """

    budget: int
    encoder_budget: int
    block_size: int
    num_embeds_bytes: int = 0  # that the plan carries
    rows: dict[int, int] = field(default_factory=dict)  # slot -> number of tokens
    sampling: dict[int, tuple[Request, int]] = field(default_factory=dict)
    filled: list[tuple[Request, int, int]] = field(default_factory=list)
    prompts: dict[int, Request] = field(default_factory=dict)
    new_requests: list[NewRequestData] = field(default_factory=list)
    grown: dict[int, tuple[int, ...]] = field(default_factory=dict)  # slot -> new blocks
    encoder_slots: list[int] = field(default_factory=list)
    copied_blocks: list[tuple[int, int]] = field(default_factory=list)
    swapped_in: list[tuple[int, int]] = field(default_factory=list)
    has_preempted: bool = False

    def add_new_request(self, new: NewRequestData) -> None:
        self.new_requests.append(new)
        self.num_embeds_bytes += len(new.prompt_embeds or b"") + len(new.encoder_embeds or b"")

    def add_row(self, request: Request, num_tokens: int) -> None:
        """Count `num_tokens` of `request` as computed, and the token that the row samples as in flight."""
        slot = request.slot
        self.rows[slot] = num_tokens
        self.budget -= num_tokens
        computed = request.num_computed_tokens = request.num_computed_tokens + num_tokens
        in_flight = request.num_tokens_in_flight
        if computed == request.num_prompt_tokens + len(request.output_token_ids) + in_flight:
            request.num_tokens_in_flight = in_flight + 1
            self.sampling[slot] = request, request.incarnation
        if computed % self.block_size < num_tokens:
            self.filled.append((request, request.incarnation, computed))
        if request.wants_prompt_logprobs and computed - num_tokens < request.num_prompt_tokens:
            self.prompts[slot] = request

    def add_beam_rows(self, request: Request, group: BeamGroup, num_tokens: int) -> None:
        """As `add_row`, for a group: its first row computes the prompt, then every live row one token per step."""
        if request.num_computed_tokens < request.num_prompt_tokens:
            self.add_row(request, num_tokens)
        else:
            for slot in group.live_slots:
                self.rows[slot] = 1
                self.budget -= 1
            request.num_computed_tokens += 1
            request.num_tokens_in_flight += 1
        if request.num_tokens_in_flight:
            self.sampling.update(dict.fromkeys(group.first_slots, (request, request.incarnation)))

    def drop_rows(self, request: Request) -> None:
        """Take back the rows of a request that loses its slots; its entry in `filled` is of an ended incarnation."""
        request.num_computed_tokens -= self.rows.get(request.slot, 0)
        for slot in _slots_of(request):
            self.budget += self.rows.pop(slot, 0)
            self.sampling.pop(slot, None)
            self.prompts.pop(slot, None)
            self.grown.pop(slot, None)


@dataclass(frozen=True, slots=True)
class _PlanInFlight:
    """What a plan that has no result yet will do; see _PlanDraft."""

    step: int
    sampling: dict[int, tuple[Request, int]]
    filled: list[tuple[Request, int, int]]
    prompts: dict[int, Request]


class Scheduler:
    """Owner of all requests, the queue and the KV cache manager. Used from one thread only.

    `on_start` is told of a request that gets a slot, each time it does.
    """

    def __init__(
        self,
        info: ModelInfo,
        *,
        enable_prefix_caching: bool = True,
        on_start: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self._on_start = on_start
        self._enable_prefix_caching = enable_prefix_caching
        self.num_preemptions = 0
        self.num_swaps = 0  # preemptions that kept in host memory what was computed
        self._waiting = RequestQueue()
        self._running: dict[int, Request] = {}  # key -> Request, in order of arrival
        self._freed_slots: list[int] = []  # told to the executor with the next plan
        self._in_flight: deque[_PlanInFlight] = deque()
        self._step = 0
        self._use(info)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        return self._waiting.num_tokens

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_plans_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_held_blocks(self) -> int:
        return self.kv_cache.num_blocks - self.kv_cache.num_free_blocks

    def check_admission(self, request: Request) -> None:
        """Raise InvalidRequestError, with both numbers, if `request` could not run even alone."""
        width = _num_slots(request)
        max_width = min(self.info.max_num_seqs, self.info.max_num_batched_tokens)
        if width > max_width:
            raise InvalidRequestError(
                f"{width} beams are wanted, but the server computes at most {max_width} rows at a time",
                param="beam_width",
            )
        if not self.kv_cache.can_ever_fit(request):
            raise InvalidRequestError(
                f"the request may need {self.kv_cache.max_blocks_of(request)} KV blocks of "
                f"{self.kv_cache.block_size} tokens, the server has {self.kv_cache.num_blocks}",
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

    def add_choices(self, choices: Sequence[Request]) -> None:
        """Queue the choices of one prompt: the first computes it, the others wait for that and fork from it."""
        leader, *siblings = choices
        self.add_request(leader)
        if leader.is_finished:
            for sibling in siblings:
                self.add_request(sibling)
        else:
            leader.siblings = siblings

    def add_beams(self, choices: Sequence[Request], key: int) -> None:
        """Queue the beam search whose results are `choices`, as one request `key`."""
        group = self._make_group(choices, key)
        self.check_admission(group.leader)
        for choice in choices:
            choice.beams = group
        self.add_request(group.leader)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End `request` now (abort, or a stop string that only its text shows); the next plan may use its blocks.

        A beam search ends with the last of its choices.
        """
        if request.is_finished:
            return
        if request.beams is not None and request is not request.beams.leader:
            request.status, request.finish_reason = RequestStatus.FINISHED, reason
            if all(choice.is_finished for choice in request.beams.choices):
                self.finish(request.beams.leader, reason)
            return
        if request in self._waiting:
            self._waiting.remove(request)
            self.kv_cache.host.drop(request.key)
        elif request.slot >= 0:
            self._release(request)
        request.status, request.finish_reason = RequestStatus.FINISHED, reason
        self._queue_siblings(request)
        self._waiting.forget(request)

    def adopt(self, info: ModelInfo) -> list[Request]:
        """Go on with a fresh executor of the same model, whose pool and limits may differ. Nothing may be running.

        Waiting requests that it could never run are finished, and returned.
        """
        assert not self._running and not self._in_flight, "adopt after requeue_all"
        self._use(info)
        unfit: list[Request] = []
        # Finishing a request queues its siblings, which are as large.
        while found := [request for request in self._waiting if not self._fits(request)]:
            unfit += [request if request.beams is None else request.beams.choices[0] for request in found]
            for request in found:
                self.finish(request, FinishReason.ABORT)
        return unfit

    def requeue_all(self) -> None:
        """The executor lost its state: running requests wait again, ahead of the others, with their output so far."""
        self._in_flight.clear()
        for request in list(self._running.values()):
            self._requeue(request)
        self._freed_slots.clear()
        self.kv_cache.forget_contents()

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
        for request, incarnation, num_tokens in plan.filled:
            if request.incarnation == incarnation:
                self.kv_cache.cache_full_blocks(request, num_tokens)
        logprobs = _take_logprobs(plan, output) if output.logprobs else {}
        updates = self._fail_rows(plan, output.failures) if output.failures else []
        sampling, eos_token_ids = plan.sampling, self._eos_token_ids
        for slot, token_id in zip(output.slots, output.token_ids, strict=True):
            request, incarnation = sampling[slot]
            if request.incarnation != incarnation:  # it has lost its slot, or finished
                continue
            request.num_tokens_in_flight -= 1
            request.output_token_ids.append(token_id)
            if request.siblings:
                self._queue_siblings(request)
            reason = request.check_stop(eos_token_ids)
            if reason is not None:
                self.finish(request, reason)
            updates.append(RequestUpdate(request, (token_id,), (logprobs[slot],) if slot in logprobs else ()))
        if output.runs:
            updates += self._take_runs(plan, output.runs)
        if output.beams:
            updates += self._advance_beams(plan, output.beams)
        return updates

    def hold_structured(self) -> list[Request]:
        """Take the requests that follow a grammar out of the queue, until `release`: a fresh executor knows none.

        They keep their places.
        """
        held = [request for request in self._waiting if request.sampling.structured_outputs is not None]
        for request in held:
            self._waiting.remove(request)
        return held

    def release(self, request: Request) -> None:
        """Queue a request that was held, unless it was finished meanwhile."""
        if not request.is_finished:
            self._waiting.push(request)

    def check_invariants(self) -> None:
        """Recompute everything that can be derived."""
        self.kv_cache.check_invariants()
        self._waiting.check_invariants()
        slots = [slot for request in self._running.values() for slot in _slots_of(request)]
        assert sorted([*slots, *self._free_slots]) == list(range(self.info.max_num_seqs)), "slots lost or shared"
        assert set(self._freed_slots) <= set(range(self.info.max_num_seqs)), "freed slot out of range"
        for request in self._running.values():
            assert request.status is RequestStatus.RUNNING, f"request {request.key} runs as {request.status}"
            assert request.num_computed_tokens <= request.num_tokens, f"request {request.key} computed too much"
            assert request.num_computed_tokens <= request.num_slots, f"request {request.key} has too few blocks"
            assert request.num_slots == self.kv_cache.num_slots_of(request), f"request {request.key}: wrong num_slots"
            planned = sum(plan.sampling.get(request.slot) == (request, request.incarnation) for plan in self._in_flight)
            assert planned == request.num_tokens_in_flight, f"request {request.key}: wrong number in flight"
        for request in self._waiting:
            assert request.slot == -1 and request.num_computed_tokens == 0, f"request {request.key} waits with a slot"
        num_swapped = sum(self.kv_cache.host.holds(request.key) for request in self._waiting)
        assert num_swapped == self.kv_cache.host.num_requests, "host blocks are held for requests that do not wait"
        if not self._running:
            assert self.num_held_blocks == 0, "blocks are held though nothing runs"

    def _use(self, info: ModelInfo) -> None:
        self.info = info
        self._eos_token_ids = frozenset(info.eos_token_ids)
        self.kv_cache = KVCacheManager(
            info.num_blocks,
            info.block_size,
            num_host_blocks=info.num_host_blocks,
            enable_prefix_caching=self._enable_prefix_caching,
        )
        self._free_slots: deque[int] = deque(range(info.max_num_seqs))

    def _fits(self, request: Request) -> bool:
        in_context = request.num_prompt_tokens + request.max_tokens <= self.info.max_model_len
        has_slots = _num_slots(request) <= min(self.info.max_num_seqs, self.info.max_num_batched_tokens)
        has_adapter = not request.adapter or request.adapter in self.info.adapters
        return in_context and has_slots and has_adapter and self.kv_cache.can_ever_fit(request)

    def _new_draft(self) -> _PlanDraft:
        budget = self.info.max_num_batched_tokens
        return _PlanDraft(budget=budget, encoder_budget=budget, block_size=self.kv_cache.block_size)

    def _schedule_running(self, draft: _PlanDraft) -> None:
        for request in list(self._running.values()):
            if draft.budget == 0:
                break
            if request.slot < 0:  # preempted for an earlier one in this very loop
                continue
            num_tokens = request.num_tokens_to_compute
            if num_tokens == 0:
                continue
            if num_tokens > draft.budget:
                num_tokens = draft.budget
            if not request.is_plain:
                self._schedule_special(request, num_tokens, draft)
                continue
            if request.num_computed_tokens + num_tokens > request.num_slots:
                blocks = self._allocate_or_preempt(request, num_tokens, draft)
                if blocks is None:
                    continue
                draft.grown[request.slot] = blocks
            draft.add_row(request, num_tokens)

    def _schedule_special(self, request: Request, num_tokens: int, draft: _PlanDraft) -> None:
        if request.beams is not None:
            self._schedule_beams(request, request.beams, num_tokens, draft)
        else:
            self._schedule_lookup(request, num_tokens, draft)

    def _schedule_lookup(self, request: Request, num_tokens: int, draft: _PlanDraft) -> None:
        """Plan a row that may compute more than it is told, in this plan and in those that are in flight."""
        at_end = request.num_computed_tokens + num_tokens == request.num_tokens
        num_extra = request.num_lookup_tokens * (request.num_tokens_in_flight + at_end)
        room = request.num_prompt_tokens + request.max_tokens - 1 - request.num_computed_tokens
        blocks = self._allocate_or_preempt(request, max(num_tokens, min(num_tokens + num_extra, room)), draft)
        if blocks is None:
            return
        if blocks:
            draft.grown[request.slot] = blocks
        draft.add_row(request, num_tokens)
        draft.budget = max(0, draft.budget - request.num_lookup_tokens * at_end)

    def _schedule_beams(self, request: Request, group: BeamGroup, num_tokens: int, draft: _PlanDraft) -> None:
        """Plan the next tokens of a beam search: all its rows, or none of them."""
        if request.num_computed_tokens >= request.num_prompt_tokens and len(group.live_slots) > draft.budget:
            return
        while (grown := self.kv_cache.allocate_beams(request, num_tokens)) is None:
            if self._preempt_last(draft) is request:
                return
        draft.grown.update({slot: blocks for slot, blocks in zip(group.slots, grown, strict=False) if blocks})
        draft.add_beam_rows(request, group, num_tokens)

    def _allocate_or_preempt(self, request: Request, num_tokens: int, draft: _PlanDraft) -> tuple[int, ...] | None:
        """Blocks for `request`, taken from the last in the queue's order if need be; None if that is itself."""
        while (blocks := self.kv_cache.allocate_slots(request, num_tokens)) is None:
            if self._preempt_last(draft) is request:
                return None
        return blocks

    def _preempt_last(self, draft: _PlanDraft) -> Request:
        """Preempt the running request that is last in the queue's order."""
        victim = max(self._running.values(), key=self._waiting.place)
        draft.drop_rows(victim)
        draft.has_preempted = True
        self._preempt(victim)
        return victim

    def _schedule_waiting(self, draft: _PlanDraft) -> None:
        while self._waiting and self._free_slots and draft.budget > 0:
            request = self._waiting.peek()
            if _num_slots(request) > len(self._free_slots) or not self._has_room_for_adapter(request):
                break
            num_encoder = len(request.encoder_token_ids)
            if num_encoder > draft.encoder_budget and draft.encoder_slots:
                break  # one encoder input may exceed the budget, but only alone
            if draft.num_embeds_bytes and draft.num_embeds_bytes + request.num_embeds_bytes > MAX_EMBEDS_BYTES:
                break
            allocation = self.kv_cache.allocate_first(request, draft.budget)
            if allocation is None:
                break
            self._waiting.take(request)
            self._start(request, draft, allocation)
            if request.beams is None:
                draft.add_row(request, allocation.num_new_tokens)
            else:
                others = zip(request.beams.slots[1:], allocation.beam_block_ids, strict=False)
                draft.grown.update({slot: blocks for slot, blocks in others if blocks})
                draft.add_beam_rows(request, request.beams, allocation.num_new_tokens)
            if allocation.needs_encoder:
                draft.encoder_slots.append(request.slot)
                draft.encoder_budget -= num_encoder

    def _has_room_for_adapter(self, request: Request) -> bool:
        """Whether the batch with `request` has no more adapters than it may have.

        The first request that has to wait for that holds up those behind it, or a popular adapter could starve others.
        """
        if not request.adapter:
            return True
        adapters = {other.adapter for other in self._running.values() if other.adapter}
        return len(adapters | {request.adapter}) <= self.info.max_loras

    def _start(self, request: Request, draft: _PlanDraft, allocation: Allocation) -> None:
        if request.num_preemptions == 0:
            request.num_cached_tokens = min(allocation.num_cached_tokens, len(request.prompt_token_ids))
        request.num_computed_tokens = allocation.num_cached_tokens
        request.fork_point = None
        request.slot = self._free_slots.popleft()
        request.status = RequestStatus.RUNNING
        beam_slots: tuple[int, ...] = ()
        if request.beams is not None:
            beam_slots = (request.slot, *(self._free_slots.popleft() for _ in range(request.beams.width - 1)))
            request.beams.start(beam_slots)
        self._running[request.key] = request
        self._on_start(request)
        draft.copied_blocks += allocation.copied_blocks
        draft.swapped_in += allocation.swapped_in
        draft.add_new_request(
            NewRequestData(
                slot=request.slot,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=tuple(request.output_token_ids),
                num_computed_tokens=allocation.num_cached_tokens,
                block_ids=allocation.block_ids,
                sampling=_executor_sampling(request),
                choice_index=request.choice_index,
                max_tokens=request.max_tokens,
                encoder_token_ids=request.encoder_token_ids,
                cross_block_ids=allocation.cross_block_ids,
                beam_slots=beam_slots,
                adapter=request.adapter,
                prompt_embeds=None if request.embeds is None else request.embeds.rows_from(request.num_computed_tokens),
                encoder_embeds=_encoder_embeds(request, needs_encoder=allocation.needs_encoder),
            )
        )

    def _issue(self, draft: _PlanDraft) -> SchedulerOutput:
        self._step += 1
        self._in_flight.append(_PlanInFlight(self._step, draft.sampling, draft.filled, draft.prompts))
        freed, self._freed_slots = tuple(self._freed_slots), []
        return SchedulerOutput(
            step=self._step,
            scheduled_slots=tuple(draft.rows),
            num_scheduled_tokens=tuple(draft.rows.values()),
            new_requests=tuple(draft.new_requests),
            new_blocks=CachedRequestData(slots=tuple(draft.grown), block_ids=tuple(draft.grown.values())),
            encoder_slots=tuple(draft.encoder_slots),
            freed_slots=freed,
            copied_blocks=tuple(draft.copied_blocks),
            swapped_out=self.kv_cache.host.take_pending(),
            swapped_in=tuple(draft.swapped_in),
        )

    def _make_group(self, choices: Sequence[Request], key: int) -> BeamGroup:
        first = choices[0]
        beam = first.sampling.beam
        assert beam is not None, f"request {first.key} has no beams"
        leader = first.twin(key)
        leader.beams = BeamGroup(leader, beam, choices, self.info.eos_token_ids)
        return leader.beams

    def _take_runs(self, plan: _PlanInFlight, runs: Sequence[TokenRun]) -> list[RequestUpdate]:
        """Take the tokens of rows that guessed: all but the last of them are computed already."""
        updates = []
        for run in runs:
            request, incarnation = plan.sampling[run.slot]
            if request.incarnation != incarnation:
                continue
            request.num_tokens_in_flight -= 1
            request.num_computed_tokens += len(run.token_ids) - 1
            if request.siblings:
                self._queue_siblings(request)
            taken: list[int] = []
            for token_id in run.token_ids:
                taken.append(token_id)
                request.output_token_ids.append(token_id)
                reason = request.check_stop(self._eos_token_ids)
                if reason is not None:
                    self.finish(request, reason)
                    break
            updates.append(RequestUpdate(request, tuple(taken)))
        return updates

    def _fail_rows(self, plan: _PlanInFlight, failures: Sequence[SlotFailure]) -> list[RequestUpdate]:
        """End the requests of rows that cannot go on."""
        updates = []
        for failure in failures:
            request, incarnation = plan.sampling[failure.slot]
            if request.incarnation == incarnation and not request.is_finished:
                self.finish(request, FinishReason.ABORT)
                choice = request if request.beams is None else request.beams.choices[0]
                updates.append(RequestUpdate(choice, (), failure=failure.message))
        return updates

    def _advance_beams(self, plan: _PlanInFlight, found: Sequence[BeamCandidates]) -> list[RequestUpdate]:
        """Take a step of every beam search that has candidates."""
        by_request: dict[int, list[BeamCandidates]] = {}
        for candidates in found:
            by_request.setdefault(plan.sampling[candidates.slot][0].key, []).append(candidates)
        updates: list[RequestUpdate] = []
        for group_candidates in by_request.values():
            request, incarnation = plan.sampling[group_candidates[0].slot]
            if request.is_finished or request.incarnation != incarnation:
                continue
            group = request.beams
            assert group is not None, f"candidates for request {request.key}, which has no beams"
            num_computed = request.num_prompt_tokens + len(request.output_token_ids)
            parents = group.advance(group_candidates)
            self.kv_cache.move_beams(request, parents, num_computed)
            request.num_tokens_in_flight -= 1
            request.output_token_ids.append(group_candidates[0].token_ids[0])  # for its length: beams have their own
            if group.lacks_results:
                self.finish(request, FinishReason.ABORT)
                lack = f"structured_outputs leaves {len(group.best())} outputs, but n is {len(group.choices)}"
                updates.append(RequestUpdate(group.choices[0], (), failure=lack))
                continue
            updates += [_update_of(choice, nodes) for choice, nodes in group.take_news()]
            if group.is_done:
                self.finish(request, FinishReason.STOP)
        return updates

    def _queue_siblings(self, request: Request) -> None:
        """Their common prompt is computed, or never will be: the other choices go next."""
        siblings, request.siblings = request.siblings, []
        for sibling in siblings:
            if not sibling.is_finished:
                sibling.fork_point = ForkPoint(request, request.incarnation)
                self._waiting.push(sibling, place_of=request)

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        request.num_preemptions += 1
        self.num_swaps += self.kv_cache.swap_out(request)
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        self._release(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_tokens_in_flight = 0
        if request.beams is not None:
            request.beams.reset()
            request.output_token_ids.clear()
        self._waiting.push(request)

    def _release(self, request: Request) -> None:
        """Take slot and blocks from a running request. Tokens in flight for it are void from now on."""
        del self._running[request.key]
        self.kv_cache.free(request)
        slots = _slots_of(request)
        self._freed_slots += slots
        self._free_slots += slots
        request.slot = -1
        request.incarnation += 1


def _slots_of(request: Request) -> tuple[int, ...]:
    """The slots of a running request."""
    return (request.slot,) if request.beams is None else request.beams.slots


def _update_of(choice: Request, nodes: Sequence[BeamNode]) -> RequestUpdate:
    """What a beam search tells of one of its choices."""
    logprobs = tuple(node.logprobs for node in nodes if node.logprobs is not None)
    return RequestUpdate(choice, tuple(node.token_id for node in nodes), logprobs)


def _num_slots(request: Request) -> int:
    return 1 if request.beams is None else request.beams.width


def _encoder_embeds(request: Request, *, needs_encoder: bool) -> bytes | None:
    if request.encoder_embeds is None:
        return None
    return request.encoder_embeds.data if needs_encoder else b""


def _take_logprobs(plan: _PlanInFlight, output: ModelRunnerOutput) -> dict[int, TokenLogprobs]:
    """Slot -> log-probabilities of the token that it sampled. Those of prompts are kept with their requests.

    A prompt's are kept even if the request has lost its slot since: they are facts about the prompt.
    """
    sampled = {}
    for item in output.logprobs:
        if item.sampled is not None:
            sampled[item.slot] = item.sampled
        if item.prompt and item.slot in plan.prompts:
            plan.prompts[item.slot].add_prompt_logprobs(item.prompt_start, item.prompt)
    return sampled


def _executor_sampling(request: Request) -> SamplingParams:
    """The parameters of `request`, without those that it has no use for any more."""
    if request.sampling.prompt_logprobs is None or request.needs_prompt_logprobs:
        return request.sampling
    return replace(request.sampling, prompt_logprobs=None)
