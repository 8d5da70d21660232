"""What the scheduler knows about adapters: who shares blocks with whom, and how many of them a batch may have."""

from __future__ import annotations

import pytest

from toy import make_info, make_request
from trivium.config import ModelInfo, PromptAdapter
from trivium.scheduler.block_hash import root_hash
from trivium.scheduler.scheduler import Scheduler
from trivium.step import ModelRunnerOutput, SchedulerOutput

PROMPT = tuple(range(2, 15))


def plan(scheduler: Scheduler) -> SchedulerOutput:
    found = scheduler.schedule()
    assert found is not None
    return found


def sampled(plan: SchedulerOutput, token_id: int = 9) -> ModelRunnerOutput:
    return ModelRunnerOutput(plan.step, plan.scheduled_slots, (token_id,) * len(plan.scheduled_slots))


@pytest.mark.parametrize(("first", "second", "is_shared"), [("a", "a", True), ("a", "b", False), ("", "a", False)])
def test_only_requests_of_one_adapter_share_a_prefix(first: str, second: str, is_shared: bool) -> None:
    scheduler = Scheduler(make_info(adapters=("a", "b"), max_loras=2))
    scheduler.add_request(make_request(1, PROMPT, adapter=first))
    scheduler.update_from_output(sampled(plan(scheduler)))
    scheduler.add_request(make_request(2, PROMPT, adapter=second))
    (new,) = plan(scheduler).new_requests
    assert new.adapter == second
    assert bool(new.num_computed_tokens) == is_shared


@pytest.mark.parametrize(("second", "is_shared"), [("a", True), ("b", False), ("", False)])
def test_only_requests_of_one_adapter_share_an_encoder_run(second: str, is_shared: bool) -> None:
    info = make_info(
        is_encoder_decoder=True, max_encoder_len=50, max_num_batched_tokens=40, adapters=("a", "b"), max_loras=2
    )
    scheduler = Scheduler(info)
    for key, adapter in enumerate(("a", second), start=1):
        scheduler.add_request(make_request(key, (0,), encoder=PROMPT, adapter=adapter))
    assert len(plan(scheduler).encoder_slots) == (1 if is_shared else 2)


def test_salt_and_adapters_cannot_be_taken_for_one_another() -> None:
    names = [("", "", ""), ("a", "", ""), ("", "a", ""), ("", "", "a"), ("a1:b", "", ""), ("a", "b", "")]
    assert len({root_hash(salt, (1,), adapters) for salt, *adapters in names}) == 6


def test_a_batch_has_no_more_adapters_than_it_may_and_nobody_overtakes() -> None:
    scheduler = Scheduler(make_info(adapters=("a", "b", "c"), max_loras=2))
    requests = [make_request(key, (5,), adapter=name, max_tokens=2) for key, name in enumerate(["a", "", "b", "a"], 1)]
    late = [make_request(key, (5,), adapter=name, max_tokens=2) for key, name in enumerate(["c", "a", ""], 5)]
    for request in (*requests, *late):
        scheduler.add_request(request)
    assert [new.adapter for new in plan(scheduler).new_requests] == ["a", "", "b", "a"]
    assert not plan(scheduler).new_requests
    assert scheduler.num_waiting == 3  # "c" waits, and those behind it with it


def test_an_adapter_that_waits_runs_when_another_has_left() -> None:
    scheduler = Scheduler(make_info(adapters=("a", "b"), max_loras=1))
    first, second = (make_request(key, (5,), adapter=name, max_tokens=1) for key, name in ((1, "a"), (2, "b")))
    scheduler.add_request(first)
    scheduler.add_request(second)
    begun = plan(scheduler)
    assert [new.adapter for new in begun.new_requests] == ["a"]
    scheduler.update_from_output(sampled(begun))
    assert first.is_finished
    assert [new.adapter for new in plan(scheduler).new_requests] == ["b"]


def test_an_executor_that_comes_back_without_the_adapter_ends_its_requests() -> None:
    scheduler = Scheduler(make_info(adapters=("a", "b"), max_loras=2))
    requests = [make_request(key, (5,), adapter=name) for key, name in enumerate(("a", "b", ""), 1)]
    for request in requests:
        scheduler.add_request(request)
    plan(scheduler)
    scheduler.requeue_all()
    assert scheduler.adopt(make_info(adapters=("b",), max_loras=2)) == [requests[0]]


SOFT = PromptAdapter("a", 6)
OTHER = PromptAdapter("b", 6)


def soft_info(**changes: object) -> ModelInfo:
    return make_info(**{"prompt_adapters": (SOFT, OTHER), "max_prompt_adapters": 2, **changes})


@pytest.mark.parametrize(("second", "num_shared"), [(SOFT, 16), (OTHER, 0), (None, 0)])
def test_only_requests_of_one_soft_prompt_share_its_tokens(second: PromptAdapter | None, num_shared: int) -> None:
    scheduler = Scheduler(soft_info(max_num_batched_tokens=40))
    scheduler.add_request(make_request(1, PROMPT, prompt_adapter=SOFT))
    scheduler.update_from_output(sampled(plan(scheduler)))
    request = make_request(2, PROMPT, prompt_adapter=second)
    scheduler.add_request(request)
    (new,) = plan(scheduler).new_requests
    assert new.prompt_adapter == ("" if second is None else second.name)
    assert new.prompt_token_ids == (0,) * (0 if second is None else 6) + PROMPT
    assert new.num_computed_tokens == num_shared
    assert request.num_cached_tokens == max(0, num_shared - 6)  # of those that the client sent


def test_virtual_tokens_of_an_encoder_are_encoded_with_its_input() -> None:
    soft = PromptAdapter("a", 6, of_encoder=True)
    info = soft_info(is_encoder_decoder=True, max_encoder_len=50, max_num_batched_tokens=60, prompt_adapters=(soft,))
    scheduler = Scheduler(info)
    for key, adapter in enumerate((soft, soft, None), start=1):
        scheduler.add_request(make_request(key, (0,), encoder=PROMPT, prompt_adapter=adapter))
    made = plan(scheduler)
    assert [len(new.encoder_token_ids) for new in made.new_requests] == [19, 19, 13]
    assert [len(new.cross_block_ids) for new in made.new_requests] == [5, 5, 4]
    assert made.encoder_slots == (made.new_requests[0].slot, made.new_requests[2].slot)
    assert all(new.prompt_token_ids == (0,) for new in made.new_requests)


def test_a_batch_has_no_more_soft_prompts_than_it_may() -> None:
    scheduler = Scheduler(soft_info(max_prompt_adapters=1, max_num_batched_tokens=60))
    for key, adapter in enumerate((SOFT, None, SOFT, OTHER, None), start=1):
        scheduler.add_request(make_request(key, (5,), prompt_adapter=adapter, max_tokens=1))
    begun = plan(scheduler)
    assert [new.prompt_adapter for new in begun.new_requests] == ["a", "", "a"]
    scheduler.update_from_output(sampled(begun))
    assert [new.prompt_adapter for new in plan(scheduler).new_requests] == ["b", ""]


@pytest.mark.parametrize("loaded", [(), (PromptAdapter("a", 7),)])
def test_an_executor_that_comes_back_with_another_soft_prompt_ends_its_requests(
    loaded: tuple[PromptAdapter, ...],
) -> None:
    scheduler = Scheduler(soft_info())
    requests = [make_request(key, (5,), prompt_adapter=adapter) for key, adapter in enumerate((SOFT, OTHER, None), 1)]
    for request in requests:
        scheduler.add_request(request)
    plan(scheduler)
    scheduler.requeue_all()
    assert scheduler.adopt(soft_info(prompt_adapters=(*loaded, OTHER))) == [requests[0]]


def test_a_soft_prompt_takes_its_part_of_the_context() -> None:
    info = soft_info(is_encoder_decoder=True, max_encoder_len=50, prompt_adapters=(SOFT, PromptAdapter("e", 4, True)))
    limits = [(info.limited_by(name).max_model_len, info.limited_by(name).max_encoder_len) for name in ("", "a", "e")]
    assert limits == [(200, 50), (194, 50), (200, 46)]
