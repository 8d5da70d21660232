"""Log-probabilities on their way to clients: each with its token, the prompt's once, whatever happens behind them."""

from __future__ import annotations

import asyncio
import math

import pytest

from toy import expected_logprobs, make_request
from trivium.errors import InvalidRequestError
from trivium.inputs import ResumedChoice
from trivium.outputs import ChoiceDelta, FinishReason, TokenLogprobs
from trivium.params import SamplingParams
from trivium.scheduler.best_of import BestOfSink
from unit.scheduler.test_engine_loop import PROMPT, Client, expected, running, text_of

ASKING = {"logprobs": 2, "prompt_logprobs": 1, "ignore_eos": True, "max_tokens": 20}


def wanted(seed: int, *, of_prompt: bool = False, **sampling: object) -> list[TokenLogprobs]:
    return expected_logprobs(make_request(seed, PROMPT, **{**ASKING, **sampling}), of_prompt=of_prompt)  # type: ignore[arg-type]


def logprobs_of(client: Client, index: int = 0) -> list[TokenLogprobs]:
    """Of one choice, each delta having one for each of its tokens."""
    deltas = [delta for delta in client.deltas if delta.index == index]
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
    return [value for delta in deltas for value in delta.logprobs]


def check_prompt(client: Client, seed: int) -> None:
    """The prompt's are in the first delta of choice 0 and nowhere else."""
    first = next(delta for delta in client.deltas if delta.index == 0)
    assert list(first.prompt_logprobs) == wanted(seed, of_prompt=True)
    assert sum(bool(delta.prompt_logprobs) for delta in client.deltas) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("detokenize", [True, False])
async def test_each_token_comes_with_its_logprobs(stream: bool, detokenize: bool) -> None:
    async with running() as world:
        clients = [world.submit(seed, stream=stream, detokenize=detokenize, **ASKING) for seed in range(1, 10)]
        await asyncio.gather(*(client.done.wait() for client in clients))
    for seed, client in enumerate(clients, 1):
        assert logprobs_of(client) == wanted(seed)
        check_prompt(client, seed)
        assert client.outputs[0].cumulative_logprob == math.fsum(value.logprob for value in wanted(seed))


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_cuts_logprobs_where_it_cuts_tokens(stream: bool) -> None:
    ids = expected(3, ignore_eos=True, max_tokens=40)
    stop = text_of(ids)[4:6]
    async with running() as world:
        client = world.submit(3, stream=stream, stop=stop, **{**ASKING, "max_tokens": 40})
        await client.done.wait()
    token_ids = client.outputs[0].token_ids
    assert 0 < len(token_ids) < 40
    assert logprobs_of(client) == wanted(3, max_tokens=40)[: len(token_ids)]
    check_prompt(client, 3)


@pytest.mark.asyncio
async def test_the_prompts_come_with_choice_0_alone() -> None:
    async with running(max_num_batched_tokens=2, num_blocks=20) as world:
        client = world.submit(5, n=3, **ASKING)
        await client.done.wait()
    for index in range(3):
        assert logprobs_of(client, index) == wanted(5)
    check_prompt(client, 5)


@pytest.mark.asyncio
async def test_nothing_is_reported_unless_asked_for() -> None:
    async with running() as world:
        client = world.submit(1)
        await client.done.wait()
    assert not any(delta.logprobs or delta.prompt_logprobs for delta in client.deltas)
    assert client.outputs[0].cumulative_logprob is None


@pytest.mark.asyncio
async def test_a_lost_executor_or_detokenizer_loses_and_repeats_none() -> None:
    async with running(max_num_batched_tokens=3) as world:
        clients = [world.submit(seed, stop=["zz"], **ASKING) for seed in range(1, 8)]
        for crash in (world.executor.crash, world.detokenizer.crash, world.executor.crash):
            count = sum(len(client.deltas) for client in clients)
            while sum(len(client.deltas) for client in clients) < count + 5:
                await asyncio.sleep(0)
            crash()
        await asyncio.gather(*(client.done.wait() for client in clients))
        assert world.executor.num_connects == 3
    for seed, client in enumerate(clients, 1):
        assert logprobs_of(client) == wanted(seed)
        check_prompt(client, seed)


@pytest.mark.asyncio
async def test_a_resumed_choice_reports_what_is_new_and_the_prompt_only_if_nothing_was_sent() -> None:
    ids = expected(4, ignore_eos=True, max_tokens=20)
    for split in range(len(ids)):
        async with running() as world:
            resume = (ResumedChoice(0, tuple(ids[:split]), emitted_chars=len(text_of(ids[:split]))),)
            client = world.submit(4, resume=resume, **ASKING)
            await client.done.wait()
        assert logprobs_of(client) == wanted(4)[split:]
        if split == 0:
            check_prompt(client, 4)
        else:
            assert not any(delta.prompt_logprobs for delta in client.deltas)


@pytest.mark.asyncio
async def test_a_resume_of_other_choices_still_brings_the_prompts_with_choice_0() -> None:
    ids = expected(4, ignore_eos=True, max_tokens=20)
    async with running() as world:
        resume = (ResumedChoice(1, tuple(ids), finished=True), ResumedChoice(2, tuple(ids[:3]), emitted_chars=3))
        client = world.submit(4, n=3, resume=resume, stream=False, **ASKING)
        while not (client.outputs[0].finished() and client.outputs[2].finished()):
            await asyncio.sleep(0)
    assert logprobs_of(client) == wanted(4) and logprobs_of(client, 2) == wanted(4)[3:]
    check_prompt(client, 4)


def whole(index: int, *logprobs: float) -> ChoiceDelta:
    values = tuple(TokenLogprobs(value, 1) for value in logprobs)
    of_prompt = (TokenLogprobs(-9.0, 9),) if index == 0 else ()
    return ChoiceDelta(index, (7,) * len(values), f"text {index}", FinishReason.STOP, None, values, of_prompt)


def test_the_best_have_the_highest_logprob_per_token_and_equals_keep_their_order() -> None:
    client = Client(3)
    sampling = SamplingParams(n=3, best_of=5, logprobs=0, prompt_logprobs=0)
    sink = BestOfSink(client, sampling, held=())
    for delta in (whole(3, -1.0), whole(1, -2.0, -2.0), whole(0, -3.0), whole(4, -0.5, -1.5, -1.0)):
        sink.deliver(1, delta)
        assert client.deltas == []
    sink.deliver(1, whole(2, -0.1, -5.0, -5.0))
    assert [(delta.index, delta.text) for delta in client.deltas] == [(0, "text 3"), (1, "text 4"), (2, "text 1")]
    assert [len(delta.logprobs) for delta in client.deltas] == [1, 3, 2]
    assert [len(delta.prompt_logprobs) for delta in client.deltas] == [1, 0, 0]


def test_a_resumed_best_of_delivers_what_its_caller_does_not_hold_and_no_logprobs_unless_asked_for() -> None:
    client = Client(2)
    sink = BestOfSink(client, SamplingParams(n=2, best_of=3), held={0})
    for index in range(3):
        sink.deliver(1, whole(index, -float(index)))
    assert [(delta.index, delta.text, delta.logprobs) for delta in client.deltas] == [(1, "text 1", ())]


@pytest.mark.asyncio
async def test_best_of_runs_all_choices_and_delivers_n() -> None:
    async with running() as world:
        client = world.submit(6, stream=False, n=2, best_of=4, **ASKING)
        assert len(client.keys) == 4  # type: ignore[attr-defined]
        await client.done.wait()
        assert [delta.index for delta in client.deltas] == [0, 1]
        check_prompt(client, 6)
        other = world.submit(7, stream=False, n=1, best_of=4, **{**ASKING, "max_tokens": 100})
        await asyncio.sleep(0.01)
        world.loop.abort(other.keys)  # type: ignore[attr-defined]
        assert other.deltas == [] and world.loop.scheduler.num_held_blocks == 0


@pytest.mark.asyncio
async def test_best_of_is_not_streamed_and_not_resumed_inside_a_choice() -> None:
    async with running() as world:
        for temperature in (0.0, 1.0):
            with pytest.raises(InvalidRequestError, match="streamed") as refused:
                world.submit(1, n=1, best_of=2, temperature=temperature)
            assert refused.value.param == "best_of"
        with pytest.raises(InvalidRequestError, match="inside a choice"):
            world.submit(1, stream=False, best_of=2, resume=(ResumedChoice(0, (5,)),))
        held = tuple(ResumedChoice(index, (5,), finished=True) for index in range(2))
        assert world.submit(1, stream=False, n=2, best_of=3, resume=held).keys == ()  # type: ignore[attr-defined]
