"""A plain model of what the plans in flight compute of prompts, which no other row may compute again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from trivium.scheduler.request import Request
from trivium.scheduler.scheduler import Scheduler
from trivium.step import NewRequestData, SchedulerOutput

Name = tuple[str, tuple[int, ...], tuple[int, ...]]  # salt, encoder input, all tokens up to the end of the block


@dataclass(slots=True)
class _Row:
    request: Request
    block_ids: list[int]
    num_computed: int
    num_tokens: int  # when it entered the batch


class PlannedPrompts:
    """Follows the plans of a scheduler with prefix caching. `requests[key - 1]` is seeded with its key.

    num_shared: blocks that a row has of another one whose plan is in flight.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request]) -> None:
        self._scheduler = scheduler
        self._requests = requests
        self._block_size = scheduler.kv_cache.block_size
        self._rows: dict[int, _Row] = {}  # slot -> row
        self._in_flight: deque[dict[Name, int]] = deque()  # of each plan: name -> block that it fills
        self._num_preemptions = 0
        self.num_shared = 0

    def lose_all(self) -> None:
        self._rows.clear()
        self._in_flight.clear()

    def acknowledge(self) -> None:
        self._in_flight.popleft()

    def follow(self, plan: SchedulerOutput) -> None:
        """Assert that `plan` computes no full block of a prompt that a plan in flight, or one of its own rows, fills.

        Excepted are blocks that have been granted to somebody since, and those that a row has to compute anyhow.
        """
        for slot in plan.freed_slots:
            self._rows.pop(slot, None)
        self._forget(plan)
        self._in_flight.append({})
        for new in plan.new_requests:
            request = self._requests[(new.sampling.seed or 0) - 1]
            num_tokens = len(new.prompt_token_ids) + len(new.output_token_ids)
            self._rows[new.slot] = _Row(request, list(new.block_ids), new.num_computed_tokens, num_tokens)
        for slot, block_ids in zip(plan.new_blocks.slots, plan.new_blocks.block_ids, strict=True):
            self._rows[slot].block_ids += block_ids
        started = {new.slot for new in plan.new_requests}
        for slot, count in zip(plan.scheduled_slots, plan.num_scheduled_tokens, strict=True):
            self._compute(self._rows[slot], count, is_new=slot in started)

    def _compute(self, row: _Row, count: int, *, is_new: bool) -> None:
        size, request = self._block_size, row.request
        start, row.num_computed = row.num_computed, row.num_computed + count
        names = self._names(request)
        in_flight = {name: block_id for plan in self._in_flight for name, block_id in plan.items()}
        if is_new:
            self.num_shared += sum(in_flight.get(name) in row.block_ids for name in names[: start // size])
        hashes = request.block_hashes.up_to(len(names), size, request.prompt_token_ids, request.output_token_ids)
        for index in range(start // size, min(row.num_computed // size, len(names))):
            is_planned = all(name in in_flight for name in names[: index + 1])
            must_compute = request.wants_prompt_logprobs or (index + 1) * size == row.num_tokens
            assert must_compute or not is_planned, f"request {request.key} computes block {index}, which is in flight"
            found = self._scheduler.kv_cache._pool.find(hashes[index])
            if found is None or found == row.block_ids[index]:  # else an older block has the name, and is what is found
                self._in_flight[-1].setdefault(names[index], row.block_ids[index])

    def _names(self, request: Request) -> list[Name]:
        """Of the full blocks of its prompt."""
        prompt, root = request.prompt_token_ids, request.block_hashes.root.hex()
        ends = range(self._block_size, len(prompt) + 1, self._block_size)
        return [(root, request.encoder_token_ids, prompt[:end]) for end in ends]

    def _forget(self, plan: SchedulerOutput) -> None:
        """Blocks that are granted to somebody have other contents from now on."""
        granted = {block_id for block_ids in plan.new_blocks.block_ids for block_id in block_ids}
        granted |= {block_id for block_id, _ in plan.swapped_in} | {block_id for _, block_id in plan.copied_blocks}
        for new in plan.new_requests:
            granted |= self._own_blocks(new, encodes=new.slot in plan.encoder_slots)
        if self._scheduler.num_preemptions > self._num_preemptions:  # blocks may have been granted and given back
            self._num_preemptions = self._scheduler.num_preemptions
            named = self._scheduler.kv_cache._pool._by_hash.values()
            granted |= {block_id for names in self._in_flight for block_id in names.values() if block_id not in named}
        for names in self._in_flight:
            for name in [name for name, block_id in names.items() if block_id in granted]:
                del names[name]

    def _own_blocks(self, new: NewRequestData, *, encodes: bool) -> set[int]:
        own = new.block_ids[new.num_computed_tokens // self._block_size :]
        return {*own, *(new.cross_block_ids if encodes else ())}
