"""What the result of a step does to the requests that it has tokens for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trivium.beam_search import BeamNode
from trivium.outputs import FinishReason, TokenLogprobs
from trivium.scheduler.kv_cache_manager import KVCacheManager
from trivium.scheduler.plan_draft import PlanInFlight
from trivium.scheduler.request import Request
from trivium.scheduler.running_rows import RunningRows
from trivium.step import BeamCandidates, ModelRunnerOutput, SlotFailure, TokenRun


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


class ResultReader:
    """Owner: the Scheduler. finish: ends a request. queue_siblings: the prompt of a request is computed."""

    def __init__(
        self,
        rows: RunningRows,
        kv_cache: KVCacheManager,
        *,
        eos_token_ids: frozenset[int],
        finish: Callable[[Request, FinishReason], None],
        queue_siblings: Callable[[Request], None],
    ) -> None:
        self._rows = rows
        self._kv_cache = kv_cache
        self._eos_token_ids = eos_token_ids
        self._eos_array = np.array(sorted(eos_token_ids), np.int64)
        self._finish = finish
        self._queue_siblings = queue_siblings

    def apply(self, plan: PlanInFlight, output: ModelRunnerOutput) -> list[RequestUpdate]:
        """Take what `output` brought for `plan`. Slots that have other requests now, or none, are passed over."""
        for slot, num_tokens in plan.filled:
            if plan.generation[slot] == self._rows.generation[slot]:
                self._kv_cache.cache_full_blocks(self._rows.request_in(slot), num_tokens)
        logprobs = _take_logprobs(plan, output) if output.logprobs else {}
        updates = self._fail_rows(plan, output.failures) if output.failures else []
        if output.slots:
            updates += self._take_tokens(plan, output, logprobs)
        if output.runs:
            updates += self._take_runs(plan, output.runs)
        if output.beams:
            updates += self._advance_beams(plan, output.beams)
        return updates

    def _take_tokens(
        self, plan: PlanInFlight, output: ModelRunnerOutput, logprobs: Mapping[int, TokenLogprobs]
    ) -> list[RequestUpdate]:
        """Append the sampled tokens, but those of requests that have lost their slots, or finished."""
        rows, slots, token_ids = self._rows, np.array(output.slots), np.array(output.token_ids)
        assert plan.samples[slots].all(), f"step {plan.step} has tokens of slots that it does not sample"
        current = plan.generation[slots] == rows.generation[slots]
        if not current.all():
            slots, token_ids = slots[current], token_ids[current]
        requests, ids = rows.requests_in(slots), token_ids.tolist()
        for request, token_id in zip(requests, ids, strict=True):
            request.output_token_ids.append(token_id)
        for index in np.flatnonzero(rows.take_tokens(slots, token_ids, self._eos_array)).tolist():
            self._look_at(requests[index])
        if not logprobs:
            return [RequestUpdate(request, (token_id,)) for request, token_id in zip(requests, ids, strict=True)]
        return [
            RequestUpdate(request, (token_id,), (logprobs[slot],) if slot in logprobs else ())
            for request, token_id, slot in zip(requests, ids, slots.tolist(), strict=True)
        ]

    def _look_at(self, request: Request) -> None:
        """What the newest token of `request` means for it and its siblings."""
        if request.siblings:
            self._queue_siblings(request)
        reason = request.check_stop(self._eos_token_ids)
        if reason is not None:
            self._finish(request, reason)

    def _take_runs(self, plan: PlanInFlight, runs: Sequence[TokenRun]) -> list[RequestUpdate]:
        """Take the tokens of rows that guessed: all but the last of them are computed already."""
        updates = []
        for run in runs:
            if not plan.is_current(run.slot, self._rows):
                continue
            request = self._rows.request_in(run.slot)
            self._rows.take_run(run.slot, len(run.token_ids))
            if request.siblings:
                self._queue_siblings(request)
            taken: list[int] = []
            for token_id in run.token_ids:
                taken.append(token_id)
                request.output_token_ids.append(token_id)
                reason = request.check_stop(self._eos_token_ids)
                if reason is not None:
                    self._finish(request, reason)
                    break
            updates.append(RequestUpdate(request, tuple(taken)))
        return updates

    def _fail_rows(self, plan: PlanInFlight, failures: Sequence[SlotFailure]) -> list[RequestUpdate]:
        """End the requests of rows that cannot go on."""
        updates = []
        for failure in failures:
            if plan.is_current(failure.slot, self._rows):
                request = self._rows.request_in(failure.slot)
                self._finish(request, FinishReason.ABORT)
                choice = request if request.beams is None else request.beams.choices[0]
                updates.append(RequestUpdate(choice, (), failure=failure.message))
        return updates

    def _advance_beams(self, plan: PlanInFlight, found: Sequence[BeamCandidates]) -> list[RequestUpdate]:
        """Take a step of every beam search that has candidates."""
        by_group: dict[int, list[BeamCandidates]] = {}  # first slot -> candidates
        for candidates in found:
            if plan.is_current(candidates.slot, self._rows):
                by_group.setdefault(self._rows.request_in(candidates.slot).slot, []).append(candidates)
        updates: list[RequestUpdate] = []
        for slot, group_candidates in by_group.items():
            request = self._rows.request_in(slot)
            group = request.beams
            assert group is not None, f"candidates for request {request.key}, which has no beams"
            num_computed = request.num_tokens
            parents = group.advance(group_candidates)
            self._kv_cache.move_beams(request, parents, num_computed)
            self._rows.num_in_flight[request.slot] -= 1
            request.output_token_ids.append(group_candidates[0].token_ids[0])  # for its length: beams have their own
            if group.lacks_results:
                self._finish(request, FinishReason.ABORT)
                lack = f"structured_outputs leaves {len(group.best())} outputs, but n is {len(group.choices)}"
                updates.append(RequestUpdate(group.choices[0], (), failure=lack))
                continue
            updates += [_update_of(choice, nodes) for choice, nodes in group.take_news()]
            if group.is_done:
                self._finish(request, FinishReason.STOP)
        return updates


def _update_of(choice: Request, nodes: Sequence[BeamNode]) -> RequestUpdate:
    """What a beam search tells of one of its choices."""
    logprobs = tuple(node.logprobs for node in nodes if node.logprobs is not None)
    return RequestUpdate(choice, tuple(node.token_id for node in nodes), logprobs)


def _take_logprobs(plan: PlanInFlight, output: ModelRunnerOutput) -> dict[int, TokenLogprobs]:
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
