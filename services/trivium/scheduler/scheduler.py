"""Decides what each step computes. Pure: no clock, no I/O, no asyncio, no torch.

There is no prefill and no decode phase: a request's `num_computed_tokens` catches up with its `num_tokens`. Plans may
be issued before the results of earlier ones have come (`max_plans_in_flight`): a token in flight belongs to its
sequence, its value stays with the executor.

Order of effects in `schedule`: rows that decode with room in their blocks get their token, all at once; the other
running requests get tokens and blocks in the order in which they started; one that cannot get a block preempts the
running request that is last in the queue's order; if nobody was preempted, waiting requests are admitted while tokens,
slots and blocks last, and share what earlier rows and plans compute of the same prompt. If more rows decode than the
step may compute, all take their turn in the order of their start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from trivium.config import ModelInfo
from trivium.embeds import MAX_EMBEDS_BYTES
from trivium.errors import InvalidRequestError
from trivium.outputs import FinishReason
from trivium.scheduler.beam_group import BeamGroup
from trivium.scheduler.kv_cache_manager import Allocation, KVCacheManager
from trivium.scheduler.new_request import new_request_data
from trivium.scheduler.plan_draft import PlanDraft, PlanInFlight
from trivium.scheduler.request import ForkPoint, Request, RequestStatus
from trivium.scheduler.request_queue import RequestQueue
from trivium.scheduler.result_reader import RequestUpdate, ResultReader
from trivium.scheduler.row_planner import RowPlanner
from trivium.scheduler.running_rows import RunningRows
from trivium.step import ModelRunnerOutput, SchedulerOutput


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
        self._in_flight: deque[PlanInFlight] = deque()
        self._num_siblings = 0  # choices that wait for the first one of their prompt
        self._step = 0
        self._use(info)

    @property
    def num_waiting(self) -> int:
        """Choices that wait: in the queue, or for the first one of their prompt."""
        return len(self._waiting) + self._num_siblings

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
            self._num_siblings += len(siblings)

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
        if draft.has_preempted and draft.is_empty:
            draft = self._new_draft()  # the last running request gave up its blocks: start over with what is free
        if not draft.has_preempted:
            self._schedule_waiting(draft)
        return None if draft.is_empty else self._issue(draft)

    def update_from_output(self, output: ModelRunnerOutput) -> list[RequestUpdate]:
        """Apply the result of the oldest plan in flight. Rows of requests that are gone are dropped."""
        plan = self._in_flight.popleft()
        assert plan.step == output.step, f"result of step {output.step}, expected {plan.step}"
        return self._results.apply(plan, output)

    def num_computed_tokens(self, request: Request) -> int:
        """Tokens of a running request that are computed or planned to be."""
        return int(self._rows.num_computed[request.slot])

    def hold_unprepared(self) -> list[Request]:
        """Take the requests that need something prepared out of the queue, until `release`.

        A fresh executor has nothing ready.

        They keep their places.
        """
        held = [request for request in self._waiting if request.sampling.needs_preparation]
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
        self._rows.check_invariants()
        for request in self._running.values():
            slot, rows = request.slot, self._rows
            assert request.status is RequestStatus.RUNNING, f"request {request.key} runs as {request.status}"
            assert rows.request_in(slot) is request, f"request {request.key} is not in its slot"
            assert rows.num_computed[slot] <= rows.num_tokens[slot], f"request {request.key} computed too much"
            assert rows.num_computed[slot] <= rows.room[slot], f"request {request.key} has too few blocks"
            assert rows.room[slot] == self.kv_cache.num_slots_of(request), f"request {request.key}: wrong room"
            planned = sum(plan.samples[slot] and plan.is_current(slot, rows) for plan in self._in_flight)
            assert planned == rows.num_in_flight[slot], f"request {request.key}: wrong number in flight"
        for request in self._waiting:
            assert request.slot == -1, f"request {request.key} waits with a slot"
        leaders = [*self._waiting, *self._running.values()]
        assert self._num_siblings == sum(len(leader.siblings) for leader in leaders), "siblings are miscounted"
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
        self._rows = RunningRows(info.max_num_seqs)
        self._planner = RowPlanner(self._rows, self.kv_cache, self._preempt_last)
        self._results = ResultReader(
            self._rows,
            self.kv_cache,
            eos_token_ids=self._eos_token_ids,
            finish=self.finish,
            queue_siblings=self._queue_siblings,
        )

    def _fits(self, request: Request) -> bool:
        in_context = request.num_prompt_tokens + request.max_tokens <= self.info.max_model_len
        has_slots = _num_slots(request) <= min(self.info.max_num_seqs, self.info.max_num_batched_tokens)
        has_adapter = not request.adapter or request.adapter in self.info.adapters
        soft = request.prompt_adapter
        has_prompt_adapter = soft is None or self.info.find_prompt_adapter(soft.name) == soft
        has_adapters = has_adapter and has_prompt_adapter
        return in_context and has_slots and has_adapters and self.kv_cache.can_ever_fit(request)

    def _new_draft(self) -> PlanDraft:
        return PlanDraft(self._rows, budget=self.info.max_num_batched_tokens, block_size=self.kv_cache.block_size)

    def _schedule_running(self, draft: PlanDraft) -> None:
        ready = self._rows.ready_to_decode()
        if ready.sum() > draft.budget:
            ready[:] = False  # then every row takes its turn
        draft.add_decoding(ready)
        for request in self._rows.others_to_plan(ready):
            if draft.budget == 0:
                break
            self._planner.plan(request, draft)

    def _preempt_last(self, draft: PlanDraft) -> Request:
        """Preempt the running request that is last in the queue's order."""
        victim = max(self._running.values(), key=self._waiting.place)
        draft.drop_rows(victim, _slots_of(victim))
        draft.has_preempted = True
        self._preempt(victim)
        return victim

    def _schedule_waiting(self, draft: PlanDraft) -> None:
        while self._waiting and self._free_slots and draft.budget > 0:
            self._planner.share_prompts(draft)
            request = self._waiting.peek()
            if _num_slots(request) > len(self._free_slots) or not self._has_room_for_adapters(request):
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
                self._planner.add_beams(request, request.beams, allocation.num_new_tokens, draft)
            if allocation.needs_encoder:
                draft.encoder_slots.append(request.slot)
                draft.encoder_budget -= num_encoder

    def _has_room_for_adapters(self, request: Request) -> bool:
        """Whether the batch with `request` has no more adapters of each kind than it may have.

        The first request that has to wait for that holds up those behind it, or a popular adapter could starve others.
        """
        running = self._running.values()
        has_room = True
        if request.adapter:
            others = {other.adapter for other in running if other.adapter}
            has_room = len(others | {request.adapter}) <= self.info.max_loras
        if request.prompt_adapter is not None:
            soft = {other.prompt_adapter for other in running if other.prompt_adapter is not None}
            has_room &= len(soft | {request.prompt_adapter}) <= self.info.max_prompt_adapters
        return has_room

    def _start(self, request: Request, draft: PlanDraft, allocation: Allocation) -> None:
        if request.incarnation == 0:
            num_cached = min(allocation.num_cached_tokens, request.num_prompt_tokens)
            request.num_cached_tokens = max(0, num_cached - request.num_virtual_tokens)
        request.fork_point = None
        request.slot = self._free_slots.popleft()
        request.status = RequestStatus.RUNNING
        beam_slots: tuple[int, ...] = ()
        if request.beams is not None:
            beam_slots = (request.slot, *(self._free_slots.popleft() for _ in range(request.beams.width - 1)))
            request.beams.start(beam_slots)
        self._running[request.key] = request
        self._rows.start(request, _slots_of(request), allocation.num_cached_tokens, self.kv_cache.num_slots_of(request))
        self._on_start(request)
        draft.copied_blocks += allocation.copied_blocks
        draft.swapped_in += allocation.swapped_in
        draft.add_new_request(new_request_data(request, allocation, beam_slots))

    def _issue(self, draft: PlanDraft) -> SchedulerOutput:
        self._planner.share_prompts(draft)
        self._step += 1
        self._in_flight.append(draft.to_plan_in_flight(self._step))
        freed, self._freed_slots = tuple(self._freed_slots), []
        return draft.to_plan(self._step, freed_slots=freed, swapped_out=self.kv_cache.host.take_pending())

    def _make_group(self, choices: Sequence[Request], key: int) -> BeamGroup:
        first = choices[0]
        beam = first.sampling.beam
        assert beam is not None, f"request {first.key} has no beams"
        leader = first.twin(key)
        leader.beams = BeamGroup(leader, beam, choices, self.info.eos_token_ids)
        return leader.beams

    def _queue_siblings(self, request: Request) -> None:
        """Their common prompt is computed, or never will be: the other choices go next."""
        siblings, request.siblings = request.siblings, []
        self._num_siblings -= len(siblings)
        if request.slot >= 0:
            self._rows.watch(request)
        for sibling in siblings:
            if not sibling.is_finished:
                sibling.fork_point = ForkPoint(request, request.incarnation)
                self._waiting.push(sibling, place_of=request)

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        request.num_preemptions += 1
        self.num_swaps += self.kv_cache.swap_out(request, self.num_computed_tokens(request))
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        self._release(request)
        request.status = RequestStatus.PREEMPTED
        if request.beams is not None:
            request.beams.reset()
            request.output_token_ids.clear()
        self._waiting.push(request)

    def _release(self, request: Request) -> None:
        """Take slot and blocks from a running request. Tokens in flight for it are void from now on."""
        del self._running[request.key]
        self.kv_cache.free(request)
        slots = _slots_of(request)
        self._rows.free(slots)
        self._freed_slots += slots
        self._free_slots += slots
        request.slot = -1
        request.incarnation += 1


def _slots_of(request: Request) -> tuple[int, ...]:
    """The slots of a running request."""
    return (request.slot,) if request.beams is None else request.beams.slots


def _num_slots(request: Request) -> int:
    return 1 if request.beams is None else request.beams.width
