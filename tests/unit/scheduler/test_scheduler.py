"""The scheduler against a toy executor that checks every plan, and against the definition of each request's output."""

import os
import random
from collections import deque

import pytest

from toy import EOS, ToyExecutor, expected_output, make_info, make_request
from trivium.errors import InvalidRequestError
from trivium.outputs import FinishReason
from trivium.scheduler.host_pool import HostPool
from trivium.scheduler.request import Request, RequestStatus
from trivium.scheduler.scheduler import Scheduler
from trivium.step import ModelRunnerOutput


class World:
    """A scheduler and a toy executor with up to `depth` plans in flight."""

    def __init__(self, depth: int = 2, *, enable_prefix_caching: bool = True, **info: object) -> None:
        self.info = make_info(**info)
        self.scheduler = Scheduler(self.info, enable_prefix_caching=enable_prefix_caching)
        self.executor = ToyExecutor(self.info)
        self.depth = depth
        self.results: deque[ModelRunnerOutput] = deque()
        self.max_rows = 0

    def step(self) -> bool:
        """Fill the pipeline, apply one result, check everything. False if there was nothing to do."""
        while len(self.results) < self.depth and (plan := self.scheduler.schedule()) is not None:
            self.max_rows = max(self.max_rows, len(plan.scheduled_slots))
            self.results.append(self.executor.execute(plan))
            self.scheduler.check_invariants()
        if not self.results:
            return False
        self.scheduler.update_from_output(self.results.popleft())
        self.scheduler.check_invariants()
        return True

    def lose_executor(self) -> None:
        self.scheduler.requeue_all()
        self.scheduler.check_invariants()
        self.executor = ToyExecutor(self.info, last_step=self.executor.last_step)
        self.results.clear()

    def run(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError("the scheduler does not come to an end")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_requests_in_a_batch_get_the_tokens_they_get_alone(depth: int) -> None:
    world = World(depth=depth)
    requests = [make_request(key, tuple(range(2, 3 + key)), max_tokens=5 + key) for key in range(1, 12)]
    for request in requests:
        world.scheduler.add_request(request)
    world.run()
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]
    assert world.max_rows > 1
    assert world.scheduler.num_held_blocks == 0


def test_a_long_prompt_is_computed_in_chunks() -> None:
    world = World(max_num_batched_tokens=4)
    request = make_request(1, tuple(range(2, 40)))
    world.scheduler.add_request(request)
    world.run()
    assert request.output_token_ids == expected_output(request)


def test_more_rows_than_a_step_may_compute_take_turns_and_all_end() -> None:
    world = World(max_num_seqs=8, max_num_batched_tokens=3)
    requests = [make_request(key, (2, key), max_tokens=4 + key, ignore_eos=True) for key in range(1, 9)]
    for request in requests:
        world.scheduler.add_request(request)
    world.run()
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]


def test_an_encoder_runs_once_and_before_its_decoder() -> None:
    world = World(is_encoder_decoder=True, max_encoder_len=64)
    requests = [make_request(key, (0,), encoder=tuple(range(2, 9 + key))) for key in range(1, 6)]
    for request in requests:
        world.scheduler.add_request(request)
    world.run()
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]
    assert world.executor.num_encoder_runs == len(requests)


def test_an_encoder_input_over_the_token_budget_still_runs() -> None:
    world = World(is_encoder_decoder=True, max_encoder_len=64, max_num_batched_tokens=8)
    request = make_request(1, (0,), encoder=tuple(range(2, 40)))
    world.scheduler.add_request(request)
    world.run()
    assert request.output_token_ids == expected_output(request)


def test_too_few_blocks_preempt_the_youngest_and_change_no_token() -> None:
    world = World(num_blocks=8)
    requests = [make_request(key, (3, 4, 5, 6), max_tokens=20, ignore_eos=True) for key in range(1, 6)]
    for request in requests:
        world.scheduler.check_admission(request)
        world.scheduler.add_request(request)
    world.run()
    assert world.scheduler.num_preemptions > 0
    assert requests[0].num_preemptions == 0, "the oldest request is never preempted"
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]


@pytest.mark.parametrize("num_host_blocks", [0, 20])
@pytest.mark.parametrize("num_blocks", [9, 10, 11, 12])
def test_choices_that_do_not_fit_together_do_not_preempt_each_other_for_ever(
    num_blocks: int, num_host_blocks: int
) -> None:
    world = World(depth=3, num_blocks=num_blocks, num_host_blocks=num_host_blocks)
    choices = [make_request(key, tuple(range(2, 18)), max_tokens=18, ignore_eos=True) for key in (1, 2, 3)]
    world.scheduler.add_choices(choices)
    world.run()
    assert world.scheduler.num_preemptions > 0
    assert choices[0].num_preemptions == 0
    assert [choice.output_token_ids for choice in choices] == [expected_output(choice) for choice in choices]


def test_with_memory_for_a_tenth_of_the_load_all_finish_and_none_waits_for_ever() -> None:
    rng = random.Random(0)
    world = World(num_blocks=64, max_num_seqs=40, max_num_batched_tokens=64)  # 256 tokens for about 2,600
    requests = []
    for key in range(1, 61):
        prompt = tuple(rng.randrange(2, 50) for _ in range(rng.randint(8, 24)))
        requests.append(make_request(key, prompt, max_tokens=rng.randint(20, 36), ignore_eos=True))
        world.scheduler.add_request(requests[-1])
    finished: dict[int, int] = {}  # request key -> steps until its end
    for step in range(10_000):
        if not world.step():
            break
        finished.update((r.key, step) for r in requests if r.is_finished and r.key not in finished)
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]
    assert world.scheduler.num_preemptions > 0
    assert max(finished.values()) <= 3 * sorted(finished.values())[len(finished) // 2]


def test_a_request_that_can_never_fit_is_refused_with_both_numbers() -> None:
    world = World(num_blocks=4)
    with pytest.raises(InvalidRequestError, match=r"13 KV blocks.*has 4"):
        world.scheduler.check_admission(make_request(1, (3,) * 10, max_tokens=43))


def test_the_last_output_token_needs_no_block() -> None:
    world = World(num_blocks=4)
    request = make_request(1, (3,) * 10, max_tokens=7, ignore_eos=True)  # 16 computed tokens = 4 blocks
    world.scheduler.check_admission(request)
    world.scheduler.add_request(request)
    world.run()
    assert len(request.output_token_ids) == 7


@pytest.mark.parametrize("when", ["waiting", "running"])
def test_an_aborted_request_gives_back_its_blocks(when: str) -> None:
    world = World()
    request, other = make_request(1, max_tokens=50, ignore_eos=True), make_request(2)
    world.scheduler.add_request(request)
    world.scheduler.add_request(other)
    if when == "running":
        world.step()
        assert world.scheduler.num_held_blocks > 0
    world.scheduler.finish(request, FinishReason.ABORT)
    world.scheduler.check_invariants()
    world.run()
    assert request.finish_reason is FinishReason.ABORT
    assert other.output_token_ids == expected_output(other)
    assert world.scheduler.num_held_blocks == 0


def test_results_that_were_in_flight_for_an_aborted_request_are_dropped() -> None:
    world = World()
    request = make_request(1, max_tokens=50, ignore_eos=True)
    world.scheduler.add_request(request)
    world.step()
    count = len(request.output_token_ids)
    world.scheduler.finish(request, FinishReason.ABORT)
    world.run()
    assert len(request.output_token_ids) == count


def test_a_resumed_request_goes_on_after_its_output() -> None:
    whole = make_request(7, max_tokens=12, ignore_eos=True)
    expected = expected_output(whole)
    for split in range(len(expected)):
        world = World()
        resumed = make_request(7, max_tokens=12, ignore_eos=True, output=tuple(expected[:split]))
        world.scheduler.add_request(resumed)
        world.run()
        assert resumed.output_token_ids == expected


def test_a_resumed_request_that_was_complete_finishes_at_once() -> None:
    scheduler = Scheduler(make_info())
    at_limit = make_request(1, max_tokens=2, output=(3, 4))
    at_eos = make_request(2, max_tokens=9, output=(3, EOS))
    for request in (at_limit, at_eos):
        scheduler.add_request(request)
    assert at_limit.finish_reason is FinishReason.LENGTH
    assert at_eos.finish_reason is FinishReason.STOP
    assert scheduler.num_waiting == 0


def test_a_lost_executor_changes_no_token() -> None:
    world = World()
    requests = [make_request(key, (3,) * key, max_tokens=15) for key in range(1, 6)]
    for request in requests:
        world.scheduler.add_request(request)
    for _ in range(4):
        world.step()
    world.lose_executor()
    world.run()
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]


def test_stop_token_ids_end_a_choice_and_min_tokens_delays_eos() -> None:
    request = make_request(3, max_tokens=30, ignore_eos=True)
    third = expected_output(request)[2]
    world = World()
    stopped = make_request(3, max_tokens=30, ignore_eos=True, stop_token_ids=(third,))
    world.scheduler.add_request(stopped)
    world.run()
    assert stopped.finish_reason is FinishReason.STOP and stopped.stop_reason == third
    assert stopped.output_token_ids[-1] == third


def test_a_common_prefix_is_computed_once() -> None:
    world = World(max_num_batched_tokens=64)
    prefix = tuple(range(2, 26))  # 6 blocks of 4
    first = make_request(1, (*prefix, 30), max_tokens=3)
    world.scheduler.add_request(first)
    world.run()
    before = world.executor.num_computed_tokens
    second = make_request(2, (*prefix, 31, 32), max_tokens=3, ignore_eos=True)
    world.scheduler.add_request(second)
    world.run()
    assert second.num_cached_tokens == 24
    assert world.executor.num_computed_tokens - before == 2 + 2
    assert second.output_token_ids == expected_output(second)


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    world = World(max_num_batched_tokens=64)
    for key in (1, 2):
        request = make_request(key, tuple(range(2, 10)), max_tokens=3)
        world.scheduler.add_request(request)
        world.run()
        assert request.output_token_ids == expected_output(request)
    assert request.num_cached_tokens == 4


def test_tenants_with_different_salts_share_nothing() -> None:
    world = World(max_num_batched_tokens=64)
    prompt = tuple(range(2, 26))
    for key, salt in ((1, "a"), (2, "b"), (3, "a")):
        request = make_request(key, prompt, max_tokens=2, cache_salt=salt)
        world.scheduler.add_request(request)
        world.run()
        assert request.num_cached_tokens == (20 if key == 3 else 0)


@pytest.mark.parametrize("together", [True, False])
def test_the_same_encoder_input_is_encoded_once(together: bool) -> None:
    world = World(is_encoder_decoder=True, max_encoder_len=64, num_blocks=64)
    source = tuple(range(2, 20))
    requests = [make_request(key, (0, key), encoder=source) for key in range(1, 6)]
    for request in requests:
        world.scheduler.add_request(request)
        if not together:
            world.run()
    world.run()
    assert world.executor.num_encoder_runs == 1
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("source", [None, tuple(range(2, 20))])
@pytest.mark.parametrize("length", [1, 2, 22, 23, 24, 25])
def test_the_choices_of_a_request_compute_their_prompt_once(
    enable_prefix_caching: bool, source: tuple[int, ...] | None, length: int
) -> None:
    world = World(
        enable_prefix_caching=enable_prefix_caching,
        is_encoder_decoder=source is not None,
        max_encoder_len=64,
        num_blocks=64,
        max_num_batched_tokens=64,
    )
    prompt = tuple(range(2, 2 + length))
    choices = [make_request(key, prompt, encoder=source, max_tokens=6, ignore_eos=True) for key in range(1, 6)]
    world.scheduler.add_choices(choices)
    world.run()
    assert world.executor.num_prompt_tokens == length + 4
    assert world.executor.num_encoder_runs == (source is not None)
    assert world.executor.num_copied == (4 if (length - 1) % 4 else 0)
    assert [choice.output_token_ids for choice in choices] == [expected_output(choice) for choice in choices]
    assert world.scheduler.num_held_blocks == 0


def test_choices_hold_the_full_blocks_of_their_prompt_together() -> None:
    world = World(enable_prefix_caching=False, num_blocks=64, max_num_batched_tokens=64)
    choices = [make_request(key, tuple(range(2, 24)), max_tokens=9, ignore_eos=True) for key in (1, 2, 3)]  # 22 tokens
    world.scheduler.add_choices(choices)
    while not all(choice.slot >= 0 for choice in choices):
        world.step()
    assert world.scheduler.num_held_blocks <= 5 + 3 * 2


def test_a_resumed_choice_forks_behind_the_whole_prompt() -> None:
    world = World(enable_prefix_caching=False, max_num_batched_tokens=64)
    prompt = tuple(range(2, 12))
    whole = [expected_output(make_request(key, prompt, max_tokens=9, ignore_eos=True)) for key in (1, 2)]
    choices = [
        make_request(key, prompt, max_tokens=9, ignore_eos=True, output=tuple(output[:3]))
        for key, output in zip((1, 2), whole, strict=True)
    ]
    world.scheduler.add_choices(choices)
    world.run()
    assert world.executor.num_prompt_tokens == len(prompt)
    assert [choice.output_token_ids for choice in choices] == whole


@pytest.mark.parametrize("loss", ["finish", "preempt", "executor"])
def test_a_choice_whose_leader_is_gone_computes_the_prompt_again(loss: str) -> None:
    world = World(depth=1, enable_prefix_caching=False, num_blocks=12, max_num_seqs=2, max_num_batched_tokens=64)
    urgent = make_request(9, tuple(range(2, 25)), max_tokens=22, ignore_eos=True)  # 23 tokens, 6 of 12 blocks
    urgent.priority = -1
    choices = [make_request(key, tuple(range(2, 19)), max_tokens=8, ignore_eos=True) for key in (1, 2)]
    world.scheduler.add_request(urgent)
    world.scheduler.add_choices(choices)
    while not choices[0].output_token_ids:
        world.step()
    assert choices[1].fork_point is not None and choices[1].slot < 0, "both slots are taken"
    if loss == "finish":
        world.scheduler.finish(choices[0], FinishReason.ABORT)
    elif loss == "executor":
        world.lose_executor()
    world.run()
    assert choices[0].num_preemptions > 0 or loss != "preempt"
    assert world.executor.num_copied == 0
    expected = [expected_output(choice) for choice in (urgent, *choices)]
    assert urgent.output_token_ids == expected[0] and choices[1].output_token_ids == expected[2]


def crowd(world: World, *, encoder: tuple[int, ...] | None = None) -> list[Request]:
    """Five requests of 24 tokens in the end, for a pool of 32."""
    requests = [
        make_request(key, (3, 4, 5, key), encoder=encoder, max_tokens=20, ignore_eos=True) for key in range(1, 6)
    ]
    for request in requests:
        world.scheduler.add_request(request)
    return requests


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_swapped_request_computes_nothing_again_but_its_last_token(depth: int, enable_prefix_caching: bool) -> None:
    world = World(depth, enable_prefix_caching=enable_prefix_caching, num_blocks=8, num_host_blocks=64)
    requests = crowd(world)
    world.run()
    scheduler = world.scheduler
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]
    assert scheduler.num_swaps > 5 and world.executor.num_swapped_in > 5
    assert scheduler.kv_cache.host.num_free_blocks == 64
    # Alone a request computes 23 tokens. What each preemption costs is the last known token, and what was in flight.
    # Of a prompt that is preempted before its first token is known, the last token is computed again, too.
    assert world.executor.num_computed_tokens <= 5 * 23 + depth * scheduler.num_preemptions


def test_without_room_in_host_memory_a_preempted_request_computes_again() -> None:
    world = World(num_blocks=8, num_host_blocks=1)
    requests = crowd(world)
    world.run()
    assert world.scheduler.num_preemptions > world.scheduler.num_swaps
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]


def test_cross_attention_blocks_of_a_swapped_request_are_found_or_encoded_again() -> None:
    world = World(num_blocks=12, num_host_blocks=64, is_encoder_decoder=True, max_encoder_len=16)
    requests = crowd(world, encoder=(7, 8, 9, 10, 11))
    world.run()
    assert world.scheduler.num_swaps > 0
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]


def swap_one_out(world: World) -> Request:
    """A request of a crowd that waits with its KV in host memory."""
    requests = crowd(world)
    while world.scheduler.num_swaps == 0:
        world.step()
    return next(request for request in requests if world.scheduler.kv_cache.host.holds(request.key))


def test_an_aborted_request_gives_back_its_host_blocks() -> None:
    world = World(num_blocks=8, num_host_blocks=16)
    request = swap_one_out(world)
    host = world.scheduler.kv_cache.host
    before, held = host.num_free_blocks, len(host.find(request.key).host_block_ids)
    world.scheduler.finish(request, FinishReason.ABORT)
    world.scheduler.check_invariants()
    assert held > 0 and host.num_free_blocks == before + held
    world.run()
    assert host.num_free_blocks == 16


def test_a_swap_that_is_aborted_before_its_plan_is_not_carried_out() -> None:
    pool = HostPool(2)
    assert pool.put(1, (7, 8), 5)
    pool.drop(1)
    assert pool.put(2, (3,), 4)
    assert [block_id for block_id, _ in pool.take_pending()] == [3]
    pool.check_invariants()


def test_a_lost_executor_loses_the_host_memory() -> None:
    world = World(num_blocks=8, num_host_blocks=16)
    request = swap_one_out(world)
    world.lose_executor()
    assert world.scheduler.kv_cache.host.num_free_blocks == 16
    world.run()
    assert request.output_token_ids == expected_output(request)


def test_an_executor_that_comes_back_with_another_host_pool_is_adopted() -> None:
    world = World(num_blocks=8, num_host_blocks=16)
    request = swap_one_out(world)
    world.lose_executor()
    world.info = make_info(num_blocks=8, num_host_blocks=3)
    assert world.scheduler.adopt(world.info) == []
    world.executor = ToyExecutor(world.info, last_step=world.executor.last_step)
    world.run()
    assert world.scheduler.kv_cache.host.num_free_blocks == 3
    assert request.output_token_ids == expected_output(request)


def test_what_the_prefix_cache_still_has_is_not_copied_back() -> None:
    world = World(depth=1, num_blocks=7, num_host_blocks=16, max_num_batched_tokens=64)
    first = make_request(1, tuple(range(2, 18)), max_tokens=4, ignore_eos=True)  # 4 blocks, and soon one more
    second = make_request(2, tuple(range(20, 30)), max_tokens=9, ignore_eos=True)  # 2 full blocks and a part of one
    for request in (first, second):
        world.scheduler.add_request(request)
    world.run()
    assert world.scheduler.num_swaps == 1 and second.num_preemptions == 1
    assert (world.executor.num_swapped_out, world.executor.num_swapped_in) == (3, 1)
    assert second.output_token_ids == expected_output(second)


@pytest.mark.parametrize("when", ["before", "during"])
def test_choices_go_on_when_the_first_is_aborted(when: str) -> None:
    world = World(max_num_batched_tokens=8)
    choices = [make_request(key, tuple(range(2, 26)), max_tokens=4) for key in (1, 2, 3)]
    world.scheduler.add_choices(choices)
    if when == "during":
        world.step()
    world.scheduler.finish(choices[0], FinishReason.ABORT)
    world.scheduler.finish(choices[2], FinishReason.ABORT)
    world.run()
    assert choices[1].output_token_ids == expected_output(choices[1])
    assert choices[2].output_token_ids == []


def test_without_prefix_caching_nothing_is_shared() -> None:
    world = World(max_num_batched_tokens=64)
    world.scheduler = Scheduler(world.info, enable_prefix_caching=False)
    for key in (1, 2):
        request = make_request(key, tuple(range(2, 26)))
        world.scheduler.add_request(request)
        world.run()
        assert request.num_cached_tokens == 0 and request.output_token_ids == expected_output(request)
    assert world.scheduler.kv_cache.num_cached_blocks == 0


def test_the_least_recently_used_contents_are_lost_first() -> None:
    world = World(num_blocks=12, max_num_batched_tokens=64)  # three prompts of 4 blocks fill it
    prompts = [tuple(range(start, start + 16)) for start in (2, 18, 34)]

    def cached(prompt: tuple[int, ...]) -> int:
        request = make_request(9, prompt, max_tokens=1)
        world.scheduler.add_request(request)
        world.run()
        return request.num_cached_tokens

    assert [cached(prompt) for prompt in prompts[:2]] == [0, 0]
    assert cached(prompts[0]) == 12  # used again, so the second is the oldest now
    assert cached(prompts[2]) == 0
    assert cached(prompts[0]) == 12


@pytest.mark.parametrize("seed", range(int(os.environ.get("TRIVIUM_SOAK_TRACES", "50"))))
def test_random_timelines_leave_every_request_with_its_own_tokens(seed: int) -> None:
    rng = random.Random(seed)
    prefixes = [tuple(rng.randrange(2, 50) for _ in range(12)) for _ in range(3)]
    world = World(
        depth=rng.randint(1, 3),
        num_blocks=rng.randint(12, 30),
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.randint(6, 24),
        is_encoder_decoder=bool(seed % 2),
        max_encoder_len=20,
        num_host_blocks=rng.choice((0, 5, 30)),
        enable_prefix_caching=rng.random() < 0.7,
    )
    requests: list[Request] = []
    for key in range(1, 40):
        encoder = tuple(rng.choice(prefixes)[: rng.choice((3, 7, 12))]) if seed % 2 else None
        prompt = rng.choice(prefixes)[: rng.randint(0, 12)] + tuple(
            rng.randrange(2, 50) for _ in range(rng.randint(1, 4))
        )
        max_tokens, priority = rng.randint(1, 18), rng.randint(0, 2)
        choices = []
        for index in range(rng.choice((1, 1, 1, 3))):
            choices.append(make_request(10 * key + index, prompt, encoder=encoder, max_tokens=max_tokens))
            choices[-1].priority = priority
            world.scheduler.check_admission(choices[-1])
        world.scheduler.add_choices(choices)
        requests.extend(choices)
        for _ in range(rng.randint(0, 3)):
            world.step()
        if rng.random() < 0.2:
            world.scheduler.finish(rng.choice(requests), FinishReason.ABORT)
            world.scheduler.check_invariants()
        if rng.random() < 0.03:
            world.lose_executor()
    world.run()
    for request in requests:
        assert request.status is RequestStatus.FINISHED
        if request.finish_reason is FinishReason.ABORT:
            length = len(request.output_token_ids)
            assert request.output_token_ids == expected_output(request)[:length]
        else:
            assert request.output_token_ids == expected_output(request)
    assert world.scheduler.num_held_blocks == 0
    assert world.scheduler.kv_cache.host.num_requests == 0
