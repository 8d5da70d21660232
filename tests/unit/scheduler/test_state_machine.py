"""Random histories of the whole scheduler against a plain-list model, and planted mistakes that it must notice.

The model is the toy executor: it keeps block contents as lists of tokens, so that a block shared, freed, granted,
named, found, copied or swapped wrongly changes what some request generates, and `expected_output` says what it must
generate.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from toy import ToyExecutor, expected_logprobs, expected_output, make_info, make_request
from trivium.outputs import FinishReason, TokenLogprobs
from trivium.scheduler import block_hash
from trivium.scheduler.block_pool import BlockPool
from trivium.scheduler.host_pool import HostPool
from trivium.scheduler.kv_cache_manager import KVCacheManager
from trivium.scheduler.plan_draft import PlanDraft
from trivium.scheduler.request import ForkPoint, Request
from trivium.scheduler.scheduler import Scheduler
from trivium.step import ModelRunnerOutput
from unit.scheduler.planned_prompts import PlannedPrompts

# 10,000 steps in `make test`; `make soak` sets a million.
NUM_STEPS = int(os.environ.get("TRIVIUM_SOAK_STEPS", "10000"))
STEPS_PER_RUN = 50

# The same blocks of two tokens at several places, after different histories.
PREFIXES = [(2, 3) * 6, (2, 3, 4, 5) * 3, (4, 5, 2, 3, 2, 3, 4, 5, 4, 5, 2, 3)]


class SchedulerMachine(RuleBasedStateMachine):
    """Small pools, small blocks, few prefixes: sharing, eviction, preemption and swaps happen all the time."""

    seen: ClassVar[Counter[str]] = Counter()  # what happened in all runs

    @initialize(
        num_blocks=st.integers(12, 24),
        block_size=st.sampled_from([2, 3]),
        num_host_blocks=st.sampled_from([0, 4, 12, 40]),
        enable_prefix_caching=st.booleans(),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(2, 24),
        is_encoder_decoder=st.booleans(),
        depth=st.integers(1, 3),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int,
        enable_prefix_caching: bool,
        max_num_seqs: int,
        budget: int,
        is_encoder_decoder: bool,
        depth: int,
    ) -> None:
        self.info = make_info(
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            is_encoder_decoder=is_encoder_decoder,
            max_encoder_len=12,
        )
        self.depth = depth
        self.scheduler = Scheduler(self.info, enable_prefix_caching=enable_prefix_caching)
        self.executor = ToyExecutor(self.info)
        self.results: deque[ModelRunnerOutput] = deque()
        self.requests: list[Request] = []
        self.expected: dict[int, list[int]] = {}  # request key -> its output, from the definition
        self.logprobs: dict[int, list[TokenLogprobs]] = {}  # request key -> of its output, as they came
        self.prompts = PlannedPrompts(self.scheduler, self.requests) if enable_prefix_caching else None

    @rule(
        prefix=st.sampled_from(PREFIXES),
        length=st.integers(0, 6),
        tail=st.integers(2, 49),
        source=st.sampled_from(PREFIXES),
        max_tokens=st.integers(1, 5),
        salt=st.sampled_from(["", "a"]),
        priority=st.integers(0, 1),
        n=st.integers(1, 3),
        logprobs=st.sampled_from([None, 0, 2]),
        prompt_logprobs=st.sampled_from([None, None, 1]),
    )
    def add(
        self,
        prefix: tuple[int, ...],
        length: int,
        tail: int,
        source: tuple[int, ...],
        max_tokens: int,
        salt: str,
        priority: int,
        n: int,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> None:
        encoder = source[: 2 + length] if self.info.is_encoder_decoder else None
        choices = []
        for index in range(n):
            key = len(self.requests) + 1
            request = make_request(
                key,
                (*prefix[:length], tail),
                encoder=encoder,
                max_tokens=max_tokens,
                cache_salt=salt,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs if index == 0 else None,
            )
            request.priority = priority
            self.scheduler.check_admission(request)
            self.requests.append(request)
            self.expected[key] = expected_output(request)
            self.logprobs[key] = []
            choices.append(request)
        self.scheduler.add_choices(choices)

    @rule(
        prompt=st.sampled_from(PREFIXES),
        length=st.integers(1, 6),
        source=st.sampled_from(PREFIXES),
        count=st.integers(2, 4),
        n=st.integers(1, 2),
        num_steps=st.integers(6, 16),
        prompt_logprobs=st.sampled_from([None, 1]),
    )
    def crowd(
        self,
        prompt: tuple[int, ...],
        length: int,
        source: tuple[int, ...],
        count: int,
        n: int,
        num_steps: int,
        prompt_logprobs: int | None = None,
    ) -> None:
        """Requests that each grow to a good part of the pool, and steps until one of them is swapped out."""
        for tail in range(2, 2 + count):
            self.add(prompt, length, tail, source[:6], 10, salt="", priority=0, n=n, prompt_logprobs=prompt_logprobs)
        for _ in range(num_steps):
            self.plan()
            self.plan()
            self.acknowledge()
            if self.scheduler.kv_cache.host.num_requests:
                return

    @rule()
    def plan(self) -> None:
        if len(self.results) < self.depth:
            plan = self.scheduler.schedule()
            if plan is not None:
                if self.prompts is not None:
                    self.prompts.follow(plan)
                self.results.append(self.executor.execute(plan))

    @rule()
    def acknowledge(self) -> None:
        if self.results:
            if self.prompts is not None:
                self.prompts.acknowledge()
            for update in self.scheduler.update_from_output(self.results.popleft()):
                self.logprobs[update.request.key] += update.logprobs

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        alive = [request for request in self.requests if not request.is_finished]
        if alive:
            self.finish(data.draw(st.sampled_from(alive)))

    @rule(data=st.data())
    def abort_one_that_is_swapped_out(self, data: st.DataObject) -> None:
        swapped = [request for request in self.requests if self.scheduler.kv_cache.host.holds(request.key)]
        if swapped:
            self.finish(data.draw(st.sampled_from(swapped)))

    def finish(self, request: Request) -> None:
        self.seen["swapped requests aborted"] += self.scheduler.kv_cache.host.holds(request.key)
        self.scheduler.finish(request, FinishReason.ABORT)

    @rule(crowded=st.booleans())
    def lose_executor(self, crowded: bool) -> None:
        if crowded:
            self.crowd(PREFIXES[0], length=4, source=PREFIXES[0], count=4, n=1, num_steps=16)
        self.scheduler.requeue_all()
        self.replace_executor()

    @rule(num_host_blocks=st.sampled_from([0, 4, 40]))
    def adopt_executor(self, num_host_blocks: int) -> None:
        self.info = replace(self.info, num_host_blocks=num_host_blocks)
        self.scheduler.requeue_all()
        assert self.scheduler.adopt(self.info) == []
        self.replace_executor()

    def replace_executor(self) -> None:
        self.count()
        self.executor = ToyExecutor(self.info, last_step=self.executor.last_step)
        self.results.clear()
        if self.prompts is not None:
            self.prompts.lose_all()

    def count(self) -> None:
        self.seen["copies"] += self.executor.num_copied
        self.seen["swaps out"] += self.executor.num_swapped_out
        self.seen["swaps in"] += self.executor.num_swapped_in

    @invariant()
    def is_consistent(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_invariants()
        for request in self.requests:
            output = request.output_token_ids
            assert output == self.expected[request.key][: len(output)], f"request {request.key}"

    def check_logprobs(self, request: Request) -> None:
        """Of a complete request: each position once, whatever happened to it."""
        wanted = expected_logprobs(request, of_prompt=False) if request.sampling.logprobs is not None else []
        assert self.logprobs[request.key] == wanted, f"request {request.key}"
        wanted = expected_logprobs(request, of_prompt=True) if request.sampling.prompt_logprobs is not None else []
        assert request.prompt_logprobs == wanted, f"prompt of request {request.key}"

    @invariant()
    def a_host_block_has_one_owner_that_waits(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        host = self.scheduler.kv_cache.host
        owned = {request.key: host.find(request.key).host_block_ids for request in self.requests}
        blocks = [block_id for ids in owned.values() for block_id in ids]
        assert len(blocks) == len(set(blocks)) and all(0 <= block_id < self.info.num_host_blocks for block_id in blocks)
        assert len(blocks) + host.num_free_blocks == self.info.num_host_blocks, "host blocks are lost"
        for request in self.requests:
            if owned[request.key]:
                assert request.slot < 0 and not request.is_finished, f"request {request.key} keeps host blocks"

    def teardown(self) -> None:
        """Everything that was not aborted comes to its end, and nothing stays held."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            self.plan()
            if not self.results:
                break
            self.acknowledge()
            self.scheduler.check_invariants()
        for request in self.requests:
            assert request.is_finished, f"request {request.key} never finished"
            if request.finish_reason is not FinishReason.ABORT:
                assert request.output_token_ids == self.expected[request.key]
                self.check_logprobs(request)
        assert self.scheduler.num_held_blocks == 0
        assert self.scheduler.kv_cache.host.num_free_blocks == self.info.num_host_blocks
        self.count()
        self.seen["prompt blocks shared in flight"] += 0 if self.prompts is None else self.prompts.num_shared


def run(num_steps: int, *, shrink: bool = True) -> None:
    checks = list(HealthCheck)
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=max(1, num_steps // STEPS_PER_RUN),
            stateful_step_count=STEPS_PER_RUN,
            deadline=None,
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
            suppress_health_check=checks,
            database=None,
            derandomize="TRIVIUM_SOAK_STEPS" not in os.environ,
            print_blob=False,
        ),
    )


def test_no_history_breaks_the_scheduler() -> None:
    SchedulerMachine.seen.clear()
    run(NUM_STEPS)
    for what in (
        "copies",
        "swaps out",
        "swaps in",
        "swapped requests aborted",
        "prompt blocks shared in flight",
    ):
        assert SchedulerMachine.seen[what] > 0, f"{what}: {SchedulerMachine.seen}"


def _free_nothing(self: BlockPool, block_ids: Any) -> None:
    for block_id in list(block_ids)[:-1]:
        _original["free"](self, [block_id])


def _free_keeps_count(self: BlockPool, block_ids: Any) -> None:
    for block_id in block_ids:
        block = self._blocks[block_id]
        block.ref_count = max(0, block.ref_count - 1)
        self._free[block_id] = None


def _share_without_count(self: BlockPool, block_ids: Any) -> None:
    for block_id in block_ids:
        self._free.pop(block_id, None)


def _share_leaves_free(self: BlockPool, block_ids: Any) -> None:
    for block_id in block_ids:
        self._blocks[block_id].ref_count += 1


def _take_keeps_name(self: BlockPool) -> int:
    block_id, _ = self._free.popitem(last=False)
    self._blocks[block_id].ref_count = 1
    return block_id


def _find_anything(self: BlockPool, wanted: Any) -> int | None:
    return next(iter(self._by_hash.values()), None)


def _name_too_early(self: KVCacheManager, request: Request, max_new_tokens: int) -> Any:
    allocation = _original["allocate_first"](self, request, max_new_tokens)
    if allocation is not None:
        self.cache_full_blocks(request, len(request.prompt_token_ids))
    return allocation


def _share_no_prompt_in_flight(self: PlanDraft) -> list[tuple[Request, int]]:
    return []


def _share_one_token_too_many(self: PlanDraft) -> list[tuple[Request, int]]:
    return [(request, num_tokens + 1) for request, num_tokens in _original["take_filled_prompts"](self)]


def _name_the_next_block(self: KVCacheManager, request: Request, num_tokens: int) -> None:
    table = self._tables[request.key]
    self._tables[request.key] = [*table[1:], table[0]]
    _original["cache_full_blocks"](self, request, num_tokens)
    self._tables[request.key] = table


def _forget_cross(self: KVCacheManager, request: Request) -> None:
    self._pool.free(reversed(self._tables.pop(request.key)))
    self._cross_tables.pop(request.key, ())
    request.num_named_blocks = 0


def _remember_after_loss(self: object) -> None:
    return None


def _one_block_short(self: KVCacheManager, num_tokens: int) -> int:
    return num_tokens // self.block_size


def _root_without_source(salt: str, encoder_token_ids: Any) -> Any:
    return _original["root_hash"](salt, ())


def _chain_without_parent(parent: Any, token_ids: Any) -> Any:
    return _original["chain_hash"](b"", token_ids)


def _prompt_logprobs_again(self: Request, start: int, values: Any) -> None:
    self.prompt_logprobs.extend(values)


def _swap_the_wrong_blocks(self: HostPool, key: int, block_ids: Any, num_tokens: int) -> bool:
    return _original["put"](self, key, [*block_ids[1:], *block_ids[:1]], num_tokens)


def _swap_tokens_in_flight(self: KVCacheManager, request: Request, num_computed_tokens: int) -> bool:
    num_tokens = min(num_computed_tokens, request.num_tokens)
    return self.host.put(request.key, self._tables[request.key][: self.num_blocks_for(num_tokens)], num_tokens)


def _take_leaks(self: HostPool, key: int) -> None:
    self._swapped.pop(key, None)


def _drop_nothing(self: HostPool, key: int) -> None:
    return None


def _keep_host_blocks(self: HostPool, key: int) -> None:
    return None


def _copy_nothing_back(self: KVCacheManager, request: Request, max_new_tokens: int) -> Any:
    allocation = _original["allocate_first"](self, request, max_new_tokens)
    return allocation and replace(allocation, swapped_in=())


def _share_the_partial_block(self: KVCacheManager, request: Request, leader: Request) -> Any:
    start = _original["_fork"](self, request, leader)
    return replace(start, shared=(*start.shared, *start.copied), copied=())


def _copy_the_first_block(self: KVCacheManager, request: Request, leader: Request) -> Any:
    start = _original["_fork"](self, request, leader)
    return replace(start, copied=start.copied and (self._tables[leader.key][0],))


def _fork_from_any_incarnation(self: ForkPoint) -> bool:
    return self.leader.slot >= 0


_original: dict[str, Callable[..., Any]] = {
    "free": BlockPool.free,
    "allocate_first": KVCacheManager.allocate_first,
    "cache_full_blocks": KVCacheManager.cache_full_blocks,
    "take_filled_prompts": PlanDraft.take_filled_prompts,
    "_fork": KVCacheManager._fork,
    "put": HostPool.put,
    "root_hash": block_hash.root_hash,
    "chain_hash": block_hash.chain_hash,
}

MUTANTS: list[tuple[Any, str, Any]] = [
    (BlockPool, "free", _free_nothing),
    (BlockPool, "free", _free_keeps_count),
    (BlockPool, "share", _share_without_count),
    (BlockPool, "share", _share_leaves_free),
    (BlockPool, "_take", _take_keeps_name),
    (BlockPool, "find", _find_anything),
    (Request, "add_prompt_logprobs", _prompt_logprobs_again),
    (Request, "num_skippable_tokens", property(lambda request: request.num_tokens - 1)),
    (KVCacheManager, "allocate_first", _name_too_early),
    (PlanDraft, "take_filled_prompts", _share_no_prompt_in_flight),
    (PlanDraft, "take_filled_prompts", _share_one_token_too_many),
    (KVCacheManager, "cache_full_blocks", _name_the_next_block),
    (KVCacheManager, "free", _forget_cross),
    (KVCacheManager, "forget_contents", _remember_after_loss),
    (KVCacheManager, "num_blocks_for", _one_block_short),
    (KVCacheManager, "swap_out", _swap_tokens_in_flight),
    (KVCacheManager, "allocate_first", _copy_nothing_back),
    (KVCacheManager, "_fork", _share_the_partial_block),
    (KVCacheManager, "_fork", _copy_the_first_block),
    (ForkPoint, "still_runs", property(_fork_from_any_incarnation)),
    (HostPool, "put", _swap_the_wrong_blocks),
    (HostPool, "take", _take_leaks),
    (HostPool, "take", _keep_host_blocks),
    (HostPool, "drop", _drop_nothing),
    (HostPool, "drop_all", _remember_after_loss),
    ("trivium.scheduler.request.root_hash", "", _root_without_source),
    ("trivium.scheduler.block_hash.chain_hash", "", _chain_without_parent),
]


@pytest.mark.parametrize(
    ("owner", "name", "mutant"),
    MUTANTS,
    ids=[getattr(getattr(mutant, "fget", mutant), "__name__", name) for _, name, mutant in MUTANTS],
)
def test_a_planted_mistake_is_caught(owner: Any, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(owner, str):
        monkeypatch.setattr(owner, mutant)
    else:
        monkeypatch.setattr(owner, name, mutant)
    with pytest.raises(Exception):  # noqa: B017 (an assertion, a group of them, or an error in the toy executor)
        run(10_000, shrink=False)
