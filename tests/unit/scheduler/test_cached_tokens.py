"""How many prompt tokens were found in the cache: counted at the first start, told once, with choice 0."""

from __future__ import annotations

import pytest

from toy import expected_beams, expected_output, make_request
from trivium.config import SchedulerConfig
from trivium.inputs import EncodedPrompt, GenerationRequest, ResumedChoice
from trivium.outputs import ChoiceDelta, FinishReason, TokenLogprobs
from trivium.params import SamplingParams
from trivium.scheduler.best_of import BestOfSink
from trivium.scheduler.session import Outbox
from unit.scheduler import test_beams as beams
from unit.scheduler.test_engine_loop import Client, World, running
from unit.scheduler.test_scheduler import World as SchedulerWorld

PROMPT = tuple(range(2, 28))  # 6 blocks of 4, and 2 tokens
NUM_FOUND = 24


async def told(
    world: World, *, stream: bool = True, resume: tuple[ResumedChoice, ...] = (), **sampling: object
) -> Client:
    """What the client of a request for PROMPT was told, whose output is the same each time."""
    params = SamplingParams(seed=3, **{"max_tokens": 6, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    client = Client(params.n)
    request = GenerationRequest("r", EncodedPrompt(PROMPT), params, stream=stream, resume=resume)
    for choice in resume:
        client.outputs[choice.index].finish_reason = "held" if choice.finished else None
    world.loop.submit(request, client, 1)
    await client.done.wait()
    assert client.error is None
    return client


def check(client: Client, expected: int | None) -> None:
    """It is in the first delta of choice 0 and nowhere else."""
    for index in client.outputs:
        of_choice = [delta.num_cached_tokens for delta in client.deltas if delta.index == index]
        first = expected if index == 0 else None
        assert of_choice == [first, *[None] * (len(of_choice) - 1)][: len(of_choice)]


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("detokenize", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_it_comes_with_the_first_delta_of_choice_0(stream: bool, detokenize: bool, n: int) -> None:
    async with running(num_blocks=64) as world:
        for expected in (0, NUM_FOUND, NUM_FOUND):
            check(await told(world, stream=stream, detokenize=detokenize, n=n), expected)


@pytest.mark.asyncio
async def test_without_prefix_caching_it_is_0_though_choices_share_their_prompt() -> None:
    async with running(SchedulerConfig(enable_prefix_caching=False)) as world:
        for _ in range(2):
            check(await told(world, n=3), 0)


@pytest.mark.asyncio
async def test_a_prompt_that_is_computed_for_its_logprobs_was_not_found() -> None:
    async with running() as world:
        check(await told(world), 0)
        check(await told(world, prompt_logprobs=0), 0)


@pytest.mark.asyncio
async def test_choices_of_best_of_share_one_number() -> None:
    async with running(num_blocks=64) as world:
        for expected in (0, NUM_FOUND):
            check(await told(world, stream=False, n=2, best_of=4), expected)


def test_the_number_of_best_of_is_of_the_first_choice_that_ran_and_goes_to_the_best() -> None:
    client = Client(2)
    sink = BestOfSink(client, SamplingParams(n=2, best_of=2), held=())
    for index, logprob in enumerate((-2.0, -1.0)):
        values = (TokenLogprobs(logprob, 1),)
        number = 8 if index == 0 else None
        sink.deliver(1, ChoiceDelta(index, (5,), str(index), FinishReason.STOP, None, values, num_cached_tokens=number))
    assert [(delta.text, delta.num_cached_tokens) for delta in client.deltas] == [("1", 8), ("0", None)]


@pytest.mark.asyncio
async def test_a_resumed_choice_does_not_tell_again() -> None:
    output = tuple(expected_output(make_request(3, PROMPT, max_tokens=6, ignore_eos=True)))
    async with running(num_blocks=64) as world:
        check(await told(world), 0)
        check(await told(world, resume=(ResumedChoice(0, output[:2], emitted_chars=2),)), None)
        check(await told(world, n=2, resume=(ResumedChoice(0, output, finished=True),)), None)
        check(await told(world, n=2, resume=(ResumedChoice(1, output, finished=True),)), NUM_FOUND)


@pytest.mark.asyncio
async def test_deltas_that_a_slow_reader_gets_as_one_keep_it() -> None:
    outbox = Outbox()
    outbox.deliver(1, ChoiceDelta(0, (5,), "a", num_cached_tokens=8))
    outbox.deliver(1, ChoiceDelta(0, (6,), "b", FinishReason.STOP))
    ((_, delta),), _ = await outbox.take(1.0)
    assert (delta.text, delta.num_cached_tokens) == ("ab", 8)


def test_a_start_after_a_preemption_does_not_count() -> None:
    world = SchedulerWorld(num_blocks=12, max_num_batched_tokens=64)  # the memory of two of the three
    requests = [make_request(key, (key, *PROMPT[:8]), max_tokens=20, ignore_eos=True) for key in (1, 2, 3)]
    for request in requests:
        world.scheduler.add_request(request)
    world.run()
    assert world.scheduler.num_preemptions > 0
    assert world.scheduler.kv_cache.num_prompt_tokens_hit > 0, "its own blocks were there yet"
    assert [request.num_cached_tokens for request in requests] == [0, 0, 0]
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]


def test_a_start_after_the_loss_of_the_executor_does_not_count() -> None:
    world = SchedulerWorld(max_num_batched_tokens=64)
    world.scheduler.add_request(make_request(1, PROMPT, max_tokens=1))
    world.run()
    request = make_request(2, PROMPT, max_tokens=9, ignore_eos=True)
    world.scheduler.add_request(request)
    world.step()
    assert request.num_cached_tokens == NUM_FOUND
    world.lose_executor()  # and with it all that was cached
    world.run()
    assert request.num_cached_tokens == NUM_FOUND and request.output_token_ids == expected_output(request)


def test_beams_have_the_number_of_their_group() -> None:
    world = beams.World(num_blocks=64, max_num_batched_tokens=64)
    for expected in (0, NUM_FOUND):
        choices = world.add_beams(3, PROMPT, n=2, max_tokens=9)
        for _ in range(3):
            world.step()
        assert [choice.num_cached_tokens for choice in choices] == [expected] * 2
        world.lose_executor()  # and with it what the first group has cached, until it has run again
        world.run()
        assert [choice.num_cached_tokens for choice in choices] == [expected] * 2
        assert [choice.output_token_ids for choice in choices] == expected_beams(choices[0])[:2]
