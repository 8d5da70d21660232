"""Plans the next tokens of one running request: the blocks they need, from others if there are no free ones, and rows.

One that decodes with room in its blocks needs none of this; `PlanDraft.add_decoding` plans all of those at once.
"""

from __future__ import annotations

from collections.abc import Callable

from trivium.scheduler.beam_group import BeamGroup
from trivium.scheduler.kv_cache_manager import KVCacheManager
from trivium.scheduler.plan_draft import PlanDraft
from trivium.scheduler.request import Request
from trivium.scheduler.running_rows import RunningRows


class RowPlanner:
    """Owner: the Scheduler. preempt_last: takes slot and blocks from the last request in the queue's order, which it
    returns."""

    def __init__(
        self, rows: RunningRows, kv_cache: KVCacheManager, preempt_last: Callable[[PlanDraft], Request]
    ) -> None:
        self._rows = rows
        self._kv_cache = kv_cache
        self._preempt_last = preempt_last

    def plan(self, request: Request, draft: PlanDraft) -> None:
        """Plan as many tokens of `request` as it has and the budget allows, or none if it lost its slot for that."""
        num_tokens = min(int(self._rows.num_tokens[request.slot] - self._rows.num_computed[request.slot]), draft.budget)
        if request.beams is not None:
            self._plan_beams(request, request.beams, num_tokens, draft)
        elif request.num_lookup_tokens:
            self._plan_lookup(request, num_tokens, draft)
        elif self._grow(request, num_tokens, draft):
            draft.add_row(request, num_tokens)

    def add_beams(self, request: Request, group: BeamGroup, num_tokens: int, draft: PlanDraft) -> None:
        """Add the rows of a group that has its blocks: the first computes the prompt, then every live one a token."""
        rows, slot = self._rows, request.slot
        if rows.num_computed[slot] < request.num_prompt_tokens:
            draft.add_row(request, num_tokens)
        else:
            draft.add_rows(group.live_slots)
            rows.num_computed[slot] += 1
            rows.num_tokens[slot] += 1
            rows.num_in_flight[slot] += 1
        if rows.num_in_flight[slot]:
            draft.expect_candidates(group.first_slots)

    def share_prompts(self, draft: PlanDraft) -> None:
        """What the rows of `draft` compute of their prompts can be found by all that are admitted from now on.

        Nobody may be preempted for this plan any more: a row that was taken back would never write its blocks.
        """
        for request, num_tokens in draft.take_filled_prompts():
            self._kv_cache.cache_full_blocks(request, num_tokens)

    def _plan_lookup(self, request: Request, num_tokens: int, draft: PlanDraft) -> None:
        """Plan a row that may compute more than it is told, in this plan and in those that are in flight."""
        rows, slot = self._rows, request.slot
        computed = int(rows.num_computed[slot])
        at_end = computed + num_tokens == rows.num_tokens[slot]
        num_extra = request.num_lookup_tokens * int(rows.num_in_flight[slot] + at_end)
        room = int(rows.end[slot]) - 1 - computed
        if self._grow(request, max(num_tokens, min(num_tokens + num_extra, room)), draft):
            draft.add_row(request, num_tokens)
            draft.budget = max(0, draft.budget - request.num_lookup_tokens * int(at_end))

    def _plan_beams(self, request: Request, group: BeamGroup, num_tokens: int, draft: PlanDraft) -> None:
        """Plan the next tokens of a beam search: all its rows, or none of them."""
        computed = int(self._rows.num_computed[request.slot])
        if computed >= request.num_prompt_tokens and len(group.live_slots) > draft.budget:
            return
        while (grown := self._kv_cache.allocate_beams(request, computed + num_tokens)) is None:
            if self._preempt_last(draft) is request:
                return
        draft.grown.update({slot: blocks for slot, blocks in zip(group.slots, grown, strict=False) if blocks})
        self._rows.room[request.slot] = self._kv_cache.num_slots_of(request)
        self.add_beams(request, group, num_tokens, draft)

    def _grow(self, request: Request, num_tokens: int, draft: PlanDraft) -> bool:
        """Give `request` room for `num_tokens` tokens more. False if it was itself the last, and is preempted."""
        slot = request.slot
        end = int(self._rows.num_computed[slot]) + num_tokens
        if end <= self._rows.room[slot]:
            return True
        while (blocks := self._kv_cache.allocate_slots(request, end)) is None:
            if self._preempt_last(draft) is request:
                return False
        draft.grown[slot] = blocks
        self._rows.room[slot] = self._kv_cache.num_slots_of(request)
        return True
