"""A common prefix that nobody has computed yet is computed once, whoever asks for it together, and whatever happens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from toy import expected_output, make_info, make_request
from trivium.config import PromptAdapter
from trivium.outputs import FinishReason
from trivium.scheduler.plan_draft import PlanDraft
from trivium.scheduler.request import Request
from trivium.scheduler.running_rows import RunningRows
from trivium.scheduler.scheduler import Scheduler
from unit.scheduler.planned_prompts import PlannedPrompts
from unit.scheduler.test_scheduler import World

PREFIX = tuple(range(2, 26))  # 6 blocks of 4
OWN = 2
EVERYTHING = 64  # budget of a step that takes all prompts of these tests


def make_sharers(count: int = 5, **options: object) -> list[Request]:
    """Requests that have PREFIX in common, and two tokens of their own each."""
    return [
        make_request(key, (*PREFIX, 30 + key, 40), max_tokens=4, ignore_eos=True, **options)  # type: ignore[arg-type]
        for key in range(1, 1 + count)
    ]


def plan(world: World) -> None:
    made = world.scheduler.schedule()
    assert made is not None
    world.results.append(world.executor.execute(made))
    world.scheduler.check_invariants()


def add(world: World, requests: Sequence[Request]) -> None:
    for request in requests:
        world.scheduler.add_request(request)


def assert_as_alone(world: World, requests: Sequence[Request]) -> None:
    world.run()
    for request in requests:
        if request.finish_reason is not FinishReason.ABORT:
            assert request.output_token_ids == expected_output(request)
    assert world.scheduler.num_held_blocks == 0


@pytest.mark.parametrize("budget", [3, 4, 10, 24, 26, 27, EVERYTHING])
@pytest.mark.parametrize("num_ahead", [0, 1, 2])
def test_a_new_prefix_is_computed_once(budget: int, num_ahead: int) -> None:
    """`num_ahead` plans are in flight when all but the first request arrive."""
    world = World(depth=3, num_blocks=64, max_num_batched_tokens=budget)
    first, *others = make_sharers()
    add(world, [first])
    for _ in range(num_ahead):
        plan(world)
    add(world, others)
    assert_as_alone(world, [first, *others])
    assert world.executor.num_prompt_tokens == len(PREFIX) + 5 * OWN
    assert [request.num_cached_tokens for request in others] == [len(PREFIX)] * 4


def test_requests_of_one_step_share_its_blocks() -> None:
    world = World(num_blocks=64, max_num_batched_tokens=EVERYTHING)
    add(world, make_sharers())
    made = world.scheduler.schedule()
    assert made is not None
    assert made.num_scheduled_tokens == (len(PREFIX) + OWN, OWN, OWN, OWN, OWN)
    assert {new.block_ids[:6] for new in made.new_requests} == {made.new_requests[0].block_ids[:6]}


def test_a_source_and_a_decoder_prefix_are_computed_once() -> None:
    world = World(is_encoder_decoder=True, max_encoder_len=64, num_blocks=64, max_num_batched_tokens=EVERYTHING)
    requests = make_sharers(encoder=tuple(range(2, 20)))
    add(world, requests)
    assert_as_alone(world, requests)
    assert world.executor.num_encoder_runs == 1
    assert world.executor.num_prompt_tokens == len(PREFIX) + 5 * OWN


@pytest.mark.parametrize(
    "options",
    [{"cache_salt": "other"}, {"adapter": "other"}, {"prompt_adapter": PromptAdapter("other", 4, False)}],
    ids=lambda options: next(iter(options)),
)
def test_what_differs_in_more_than_its_tokens_shares_nothing(options: dict[str, object]) -> None:
    adapters = PromptAdapter("other", 4, False)
    info = make_info(
        num_blocks=64,
        max_num_batched_tokens=EVERYTHING,
        adapters=("other",),
        max_loras=1,
        prompt_adapters=(adapters,),
        max_prompt_adapters=1,
    )
    scheduler = Scheduler(info)
    one, other = make_request(1, PREFIX), make_request(2, PREFIX, **options)  # type: ignore[arg-type]
    scheduler.add_request(one)
    scheduler.add_request(other)
    made = scheduler.schedule()
    assert made is not None
    assert not set(made.new_requests[0].block_ids) & set(made.new_requests[1].block_ids)
    assert other.num_cached_tokens == 0


def test_different_sources_share_no_decoder_prefix() -> None:
    world = World(is_encoder_decoder=True, max_encoder_len=64, num_blocks=64, max_num_batched_tokens=EVERYTHING)
    requests = [make_request(key, PREFIX, encoder=(5, 6, key), max_tokens=3) for key in (1, 2)]
    add(world, requests)
    assert_as_alone(world, requests)
    assert world.executor.num_prompt_tokens == 2 * len(PREFIX)


def test_without_prefix_caching_everybody_computes_the_prefix() -> None:
    world = World(enable_prefix_caching=False, num_blocks=64, max_num_batched_tokens=EVERYTHING)
    requests = make_sharers()
    add(world, requests)
    assert_as_alone(world, requests)
    assert world.executor.num_prompt_tokens == 5 * (len(PREFIX) + OWN)


@pytest.mark.parametrize("budget", [8, EVERYTHING])
def test_the_end_of_the_request_that_computes_it_is_nothing_to_those_that_share_it(budget: int) -> None:
    world = World(num_blocks=64, max_num_batched_tokens=budget)
    first, *others = make_sharers()
    add(world, [first])
    plan(world)
    add(world, others)
    world.scheduler.finish(first, FinishReason.ABORT)
    assert_as_alone(world, others)
    assert world.executor.num_prompt_tokens == len(PREFIX) + 4 * OWN + (OWN if budget == EVERYTHING else 0)


def test_a_prefix_of_which_a_part_was_planned_is_gone_on_with_by_another() -> None:
    """The first request ends in the middle of its prompt, when two plans are in flight."""
    world = World(num_blocks=64, max_num_batched_tokens=8)
    first, *others = make_sharers()
    add(world, [first, *others])
    plan(world)
    plan(world)
    world.scheduler.finish(first, FinishReason.ABORT)
    assert_as_alone(world, others)
    assert [request.num_cached_tokens for request in others] == [16, 24, 24, 24]


def test_the_preemption_of_the_request_that_computes_it_is_nothing_to_those_that_share_it() -> None:
    """Memory for two of the five: they come and go, and what each of them says stays."""
    world = World(num_blocks=9, max_num_batched_tokens=EVERYTHING)
    requests = [make_request(key, (*PREFIX, 30 + key), max_tokens=10, ignore_eos=True) for key in range(1, 6)]
    add(world, requests)
    assert_as_alone(world, requests)
    assert world.scheduler.num_preemptions > 0


def test_a_lost_executor_takes_what_was_planned_with_it() -> None:
    world = World(depth=3, num_blocks=64, max_num_batched_tokens=EVERYTHING)
    first, *others = make_sharers()
    add(world, [first])
    plan(world)
    add(world, others)
    plan(world)
    world.lose_executor()
    assert_as_alone(world, [first, *others])
    assert world.executor.num_prompt_tokens == len(PREFIX) + 5 * OWN, "the new executor computes it once, too"


def test_blocks_with_output_are_found_only_after_their_step_is_acknowledged() -> None:
    """A row may end on the executor before the scheduler knows: then a plan on its way fills no block."""
    world = World(depth=3, num_blocks=64, max_num_batched_tokens=EVERYTHING)
    first = make_request(1, PREFIX, max_tokens=9, ignore_eos=True)
    output = tuple(expected_output(first))
    add(world, [first])
    for _ in range(5):
        plan(world)  # 24 tokens of the prompt and 4 of the output: 7 blocks
    second = make_request(2, (*PREFIX, *output[:4], 30), max_tokens=3)
    add(world, [second])
    plan(world)
    assert second.num_cached_tokens == len(PREFIX)
    assert_as_alone(world, [first, second])
    third = make_request(3, second.prompt_token_ids, max_tokens=3)
    add(world, [third])
    assert_as_alone(world, [third])
    assert third.num_cached_tokens == len(PREFIX) + 4


def test_log_probabilities_of_a_prompt_are_computed_by_the_request_that_wants_them() -> None:
    world = World(num_blocks=64, max_num_batched_tokens=EVERYTHING)
    requests = [*make_sharers(2), make_request(3, PREFIX, max_tokens=3, prompt_logprobs=1)]
    add(world, requests)
    assert_as_alone(world, requests)
    assert world.executor.num_prompt_tokens == len(PREFIX) + 2 * OWN + len(PREFIX)


def test_a_row_that_is_taken_back_from_a_plan_shares_nothing() -> None:
    rows = RunningRows(2)
    draft = PlanDraft(rows, budget=EVERYTHING, block_size=4)
    request = make_request(1, PREFIX)
    request.slot = 0
    rows.start(request, (0,), 0, 24)
    draft.add_row(request, 10)
    draft.drop_rows(request, (0,))
    assert draft.take_filled_prompts() == []
    draft.add_row(request, 10)
    assert draft.take_filled_prompts() == [(request, 10)]
    assert draft.take_filled_prompts() == []


def test_the_model_of_plans_in_flight_finds_a_block_that_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlanDraft, "take_filled_prompts", lambda self: [])
    scheduler, requests = Scheduler(make_info(max_num_batched_tokens=EVERYTHING, num_blocks=64)), make_sharers(2)
    for request in requests:
        scheduler.add_request(request)
    made = scheduler.schedule()
    assert made is not None
    with pytest.raises(AssertionError, match="request 2 computes block 0, which is in flight"):
        PlannedPrompts(scheduler, requests).follow(made)
