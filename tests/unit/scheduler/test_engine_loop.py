"""The engine loop with a toy executor and a toy language: what clients are told, whatever happens behind it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from toy import (
    ToyDetokenizerClient,
    ToyExecutorClient,
    expected_output,
    make_info,
    make_request,
    toy_text,
)
from trivium.config import SchedulerConfig
from trivium.errors import (
    ContextLengthError,
    EngineUnavailableError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    TriviumError,
)
from trivium.inputs import EncodedPrompt, GenerationRequest, ResumedChoice
from trivium.outputs import ChoiceDelta, CompletionOutput, FinishReason
from trivium.params import SamplingParams
from trivium.scheduler.engine_loop import EngineLoop
from trivium.scheduler.session import Session

PROMPT = (5, 6, 7)


class Client:
    """A DeltaSink that keeps everything; `done` is set when all choices have finished or the request failed."""

    def __init__(self, n: int = 1) -> None:
        self.outputs = {index: CompletionOutput(index) for index in range(n)}
        self.deltas: list[ChoiceDelta] = []
        self.error: TriviumError | None = None
        self.done = asyncio.Event()

    def deliver(self, handle: int, delta: ChoiceDelta) -> None:
        assert not self.outputs[delta.index].finished(), "delta after the last one"
        self.deltas.append(delta)
        self.outputs[delta.index].add(delta)
        if all(output.finished() for output in self.outputs.values()):
            self.done.set()

    def fail(self, handle: int, error: TriviumError) -> None:
        self.error = error
        self.done.set()


class World:
    def __init__(self, *, config: SchedulerConfig | None = None, **info: object) -> None:
        self.executor = ToyExecutorClient(make_info(**info))
        self.detokenizer = ToyDetokenizerClient()
        config = config or SchedulerConfig(max_waiting_requests=50)
        self.loop = EngineLoop(self.executor, self.detokenizer, config)

    def submit(
        self,
        seed: int,
        *,
        stream: bool = True,
        resume: tuple[ResumedChoice, ...] = (),
        priority: int = 0,
        **sampling: object,
    ) -> Client:
        params = SamplingParams(seed=seed, **{"max_tokens": 12, **sampling})  # type: ignore[arg-type]
        client = Client(params.n)
        request = GenerationRequest(
            f"r{seed}", EncodedPrompt(PROMPT), params, stream=stream, resume=resume, priority=priority
        )
        client.keys = self.loop.submit(request, client, seed)  # type: ignore[attr-defined]
        return client


@contextlib.asynccontextmanager
async def running(config: SchedulerConfig | None = None, **info: object) -> AsyncIterator[World]:
    world = World(config=config, **info)
    task = asyncio.create_task(world.loop.run())
    while not world.loop.is_ready:
        await asyncio.sleep(0)
    try:
        yield world
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        world.loop.scheduler.check_invariants()


def expected(seed: int, **sampling: object) -> list[int]:
    return expected_output(make_request(seed, PROMPT, **{"max_tokens": 12, **sampling}))  # type: ignore[arg-type]


def text_of(ids: list[int]) -> str:
    return toy_text([token_id for token_id in ids if token_id != 1])


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [True, False])
async def test_tokens_and_text_arrive_whole(stream: bool) -> None:
    async with running() as world:
        clients = [world.submit(seed, stream=stream) for seed in range(1, 20)]
        await asyncio.gather(*(client.done.wait() for client in clients))
        for seed, client in enumerate(clients, 1):
            assert client.outputs[0].token_ids == expected(seed)
            assert client.outputs[0].text == text_of(expected(seed))
            assert len(client.deltas) == 1 or stream
        assert world.loop.scheduler.num_held_blocks == 0
        assert len(world.loop._outputs) == 0


@pytest.mark.asyncio
async def test_a_request_that_is_not_streamed_is_detokenized_once() -> None:
    async with running() as world:
        await world.submit(1, stream=False, ignore_eos=True).done.wait()
        assert [len(push.rows) for push in world.detokenizer.pushes] == [1]


@pytest.mark.asyncio
async def test_one_push_per_step_serves_all_requests() -> None:
    async with running() as world:
        clients = [world.submit(seed, ignore_eos=True) for seed in range(1, 7)]
        await asyncio.gather(*(client.done.wait() for client in clients))
        assert len(world.detokenizer.pushes) <= len(world.executor.plans) + 1
        assert max(len(push.rows) for push in world.detokenizer.pushes) >= 4


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("include", [True, False])
async def test_a_stop_string_ends_the_choice_at_its_token(stream: bool, include: bool) -> None:
    ids = expected(3, ignore_eos=True, max_tokens=40)
    text = text_of(ids)
    stop = text[4:6]
    cut = text.index(stop)
    async with running() as world:
        client = world.submit(
            3, stream=stream, stop=stop, include_stop_str_in_output=include, ignore_eos=True, max_tokens=40
        )
        await client.done.wait()
        output = client.outputs[0]
        assert output.text == text[: cut + (2 if include else 0)]
        assert output.finish_reason == "stop" and output.stop_reason == stop
        assert text_of(output.token_ids) == text[: cut + 2]
        await asyncio.sleep(0.01)
        assert world.loop.scheduler.num_held_blocks == 0


@pytest.mark.asyncio
async def test_n_choices_of_one_request() -> None:
    async with running() as world:
        client = world.submit(5, n=3)
        await client.done.wait()
        assert all(output.token_ids == expected(5) for output in client.outputs.values())


@pytest.mark.asyncio
async def test_an_aborted_request_frees_its_blocks_and_is_told_nothing_more() -> None:
    async with running() as world:
        client = world.submit(2, ignore_eos=True, max_tokens=100)
        while not client.deltas:
            await asyncio.sleep(0)
        world.loop.abort(client.keys)  # type: ignore[attr-defined]
        count = len(client.deltas)
        assert world.loop.scheduler.num_held_blocks == 0
        other = world.submit(3)
        await other.done.wait()
        assert len(client.deltas) == count
        assert world.detokenizer.num_open == 0


@pytest.mark.asyncio
async def test_a_lost_executor_is_a_pause() -> None:
    async with running() as world:
        clients = [world.submit(seed, ignore_eos=True, max_tokens=30) for seed in range(1, 6)]
        while len(clients[0].deltas) < 5:
            await asyncio.sleep(0)
        world.executor.crash()
        await asyncio.gather(*(client.done.wait() for client in clients))
        assert world.executor.num_connects == 2
        for seed, client in enumerate(clients, 1):
            assert client.outputs[0].token_ids == expected(seed, ignore_eos=True, max_tokens=30)
            assert client.outputs[0].text == text_of(client.outputs[0].token_ids)


@pytest.mark.asyncio
async def test_an_executor_lost_while_nothing_runs_is_replaced() -> None:
    async with running() as world:
        world.executor.crash()
        while world.executor.num_connects < 2:
            await asyncio.sleep(0)
        client = world.submit(1)
        await client.done.wait()
        assert client.outputs[0].token_ids == expected(1)


@pytest.mark.asyncio
@pytest.mark.parametrize("after", [0, 1, 3, 8])
async def test_a_lost_detokenizer_repeats_and_drops_nothing(after: int) -> None:
    async with running() as world:
        clients = [world.submit(seed, ignore_eos=True, max_tokens=30, stop=["zz"]) for seed in range(1, 6)]
        while len(clients[0].deltas) < after:
            await asyncio.sleep(0)
        world.detokenizer.crash()
        await asyncio.gather(*(client.done.wait() for client in clients))
        for seed, client in enumerate(clients, 1):
            assert client.outputs[0].token_ids == expected(seed, ignore_eos=True, max_tokens=30)
            assert client.outputs[0].text == text_of(client.outputs[0].token_ids)


@pytest.mark.asyncio
async def test_a_resumed_request_delivers_only_what_is_new() -> None:
    ids = expected(4, ignore_eos=True)
    for split in range(len(ids)):
        async with running() as world:
            resume = (ResumedChoice(0, tuple(ids[:split]), emitted_chars=len(text_of(ids[:split]))),)
            client = world.submit(4, resume=resume, ignore_eos=True)
            await client.done.wait()
            assert client.outputs[0].token_ids == ids[split:]
            assert client.outputs[0].text == text_of(ids[split:])


@pytest.mark.asyncio
async def test_a_resumed_request_that_was_complete_gets_its_end() -> None:
    ids = expected(4, ignore_eos=True)
    async with running() as world:
        resume = (ResumedChoice(0, tuple(ids), emitted_chars=len(text_of(ids)) - 1),)
        client = world.submit(4, resume=resume, ignore_eos=True)
        await client.done.wait()
        assert client.outputs[0].token_ids == []
        assert client.outputs[0].text == text_of(ids)[-1]
        assert client.outputs[0].finish_reason == FinishReason.LENGTH


@pytest.mark.asyncio
async def test_without_detokenizing_only_tokens_are_delivered() -> None:
    async with running() as world:
        client = world.submit(6, detokenize=False, ignore_eos=True)
        await client.done.wait()
        assert client.outputs[0].token_ids == expected(6, ignore_eos=True)
        assert client.outputs[0].text == "" and world.detokenizer.pushes == []


@pytest.mark.asyncio
async def test_what_cannot_run_is_refused_and_leaves_nothing_behind() -> None:
    async with running() as world:
        with pytest.raises(ContextLengthError, match="max_tokens"):
            world.submit(1, max_tokens=1000)
        with pytest.raises(InvalidRequestError, match="KV blocks"):
            world.submit(1, max_tokens=190)
        with pytest.raises(InvalidRequestError, match="resume"):
            world.submit(1, resume=(ResumedChoice(3, ()),))
        for seed in range(1, 51):
            world.submit(seed, max_tokens=1)
        with pytest.raises(OverloadedError, match="limit is 50"):
            world.submit(51, max_tokens=1)


@pytest.mark.asyncio
async def test_a_bug_in_the_loop_reaches_every_client() -> None:
    world = World()

    def explode(plan: object) -> None:
        raise AssertionError("planted")

    task = asyncio.create_task(world.loop.run())
    while not world.loop.is_ready:
        await asyncio.sleep(0)
    world.executor.on_plan = explode
    client = world.submit(1)
    await client.done.wait()
    assert isinstance(client.error, InternalError)
    with pytest.raises(ExceptionGroup):
        await task


@pytest.mark.asyncio
async def test_whoever_comes_while_the_loop_fails_is_told_so() -> None:
    world = World()
    task = asyncio.create_task(world.loop.run())
    while not world.loop.is_ready:
        await asyncio.sleep(0)
    world.executor.info = make_info(vocab_size=7)
    world.executor.crash()
    clients, num_refused = [], 0
    while not task.done():
        try:
            clients.append(world.submit(len(clients) + 1, ignore_eos=True, max_tokens=100))
        except EngineUnavailableError:
            num_refused += 1
        await asyncio.sleep(0)
    assert isinstance(task.exception(), ExceptionGroup) and num_refused > 0
    assert all(isinstance(client.error, InternalError) for client in clients)


@pytest.mark.asyncio
async def test_a_request_that_waits_too_long_is_told_so() -> None:
    async with running(SchedulerConfig(queue_timeout_s=0.05), max_num_seqs=1) as world:
        first = world.submit(1, max_tokens=100, ignore_eos=True)
        world.executor.on_plan = lambda plan: time.sleep(0.002)  # a slow model: the first one takes 0.2 s
        second = world.submit(2)
        await asyncio.gather(first.done.wait(), second.done.wait())
        assert first.error is None and len(first.outputs[0].token_ids) == 100
        assert isinstance(second.error, EngineUnavailableError) and second.error.code == "queue_timeout"
        assert world.loop.scheduler.num_waiting == 0


@pytest.mark.asyncio
async def test_choices_that_wait_for_the_first_of_them_count_as_waiting() -> None:
    async with running() as world:
        clients = [world.submit(seed, n=16) for seed in range(3)]
        with pytest.raises(OverloadedError, match="48 requests wait already, the limit is 50"):
            world.submit(3, n=3)
        clients.append(world.submit(4, n=2))
        await asyncio.gather(*(client.done.wait() for client in clients))
        assert world.loop.scheduler.num_waiting == 0
        clients = [world.submit(seed, n=16) for seed in range(3)]
        world.loop.abort(clients[0].keys)
        world.submit(5, n=16)
        for client in clients[1:]:
            await client.done.wait()


@pytest.mark.asyncio
async def test_the_queue_is_bounded_by_tokens_too() -> None:
    async with running(SchedulerConfig(max_waiting_tokens=2 * len(PROMPT))) as world:
        world.submit(1)
        world.submit(2)
        with pytest.raises(OverloadedError, match="6 prompt tokens wait already, the limit is 6"):
            world.submit(3)


@pytest.mark.asyncio
async def test_priorities_need_the_policy_that_heeds_them() -> None:
    async with running() as world:
        with pytest.raises(InvalidRequestError, match="policy is fcfs"):
            world.submit(1, priority=1)
    async with running(SchedulerConfig(scheduling_policy="priority"), max_num_seqs=1) as world:
        finished: list[int] = []
        clients = {priority: world.submit(priority, priority=priority) for priority in (5, 3, 1, 4, 2)}

        async def note(priority: int) -> None:
            await clients[priority].done.wait()
            finished.append(priority)

        await asyncio.gather(*(note(priority) for priority in clients))
        assert finished == [1, 2, 3, 4, 5]


@pytest.mark.asyncio
async def test_the_choices_of_a_request_compute_their_prompt_once() -> None:
    async with running(max_num_batched_tokens=64) as world:
        client = Client(4)
        prompt = EncodedPrompt(tuple(range(2, 42)))
        params = SamplingParams(n=4, seed=3, max_tokens=2, ignore_eos=True)
        world.loop.submit(GenerationRequest("r", prompt, params, stream=True), client, 0)
        await client.done.wait()
        assert world.executor.executor.num_computed_tokens == 40 + 3 + 4


@pytest.mark.asyncio
async def test_an_executor_may_come_back_with_less_memory() -> None:
    async with running(num_blocks=32) as world:
        large = world.submit(1, ignore_eos=True, max_tokens=100)
        small = [world.submit(seed, ignore_eos=True, max_tokens=20) for seed in range(2, 6)]
        while not small[0].deltas:
            await asyncio.sleep(0)
        world.executor.info = make_info(num_blocks=12, max_num_seqs=2)
        world.executor.crash()
        await asyncio.gather(*(client.done.wait() for client in (large, *small)))
        assert isinstance(large.error, EngineUnavailableError)
        for seed, client in enumerate(small, 2):
            assert client.outputs[0].token_ids == expected(seed, ignore_eos=True, max_tokens=20)


@pytest.mark.asyncio
async def test_an_executor_with_another_model_is_not_taken() -> None:
    world = World()
    task = asyncio.create_task(world.loop.run())
    while not world.loop.is_ready:
        await asyncio.sleep(0)
    client = world.submit(1, ignore_eos=True, max_tokens=100)
    world.executor.info = make_info(vocab_size=7)
    world.executor.crash()
    await client.done.wait()
    assert isinstance(client.error, InternalError)
    with pytest.raises(ExceptionGroup):
        await task


@pytest.mark.asyncio
async def test_a_choice_that_waits_too_long_ends_its_whole_request_and_nobody_elses() -> None:
    async with running(SchedulerConfig(queue_timeout_s=0.05), max_num_seqs=1) as world:
        world.executor.on_plan = lambda plan: time.sleep(0.002)
        sinks = [Session(world.loop, never_asked), Session(world.loop, never_asked)]
        requests = [(1, 2, 60), (2, 1, 20)]  # (seed, n, max_tokens): the second choice of the first never gets a slot
        for sink, (seed, n, max_tokens) in zip(sinks, requests, strict=True):
            params = SamplingParams(n=n, seed=seed, max_tokens=max_tokens, ignore_eos=True)
            request = GenerationRequest("r", EncodedPrompt(PROMPT), params, stream=True)
            sink._keys[7] = world.loop.submit(request, sink, 7)
            sink._num_left[7] = n
        errors: list[tuple[int, TriviumError]] = []
        while not errors:
            _, errors = await sinks[0].outbox.take(1.0)
        assert [error.code for _, error in errors] == ["queue_timeout"]
        # The second request may have got the slot of the first just before its own time was over.
        rows, errors = [], []
        while not errors and not any(delta.finish_reason for _, delta in rows):
            rows, errors = await sinks[1].outbox.take(1.0)
        assert [error.code for _, error in errors] in ([], ["queue_timeout"])
        assert world.loop.scheduler.num_held_blocks == 0
        client = world.submit(3)
        await client.done.wait()
        assert client.outputs[0].token_ids == expected(3)


async def never_asked(message: object) -> GenerationRequest:
    raise AssertionError("this session is not spoken to")


@pytest.mark.asyncio
async def test_an_executor_with_less_memory_ends_all_choices_of_what_no_longer_fits() -> None:
    async with running(num_blocks=32) as world:
        large = world.submit(1, n=3, ignore_eos=True, max_tokens=100)
        world.executor.info = make_info(num_blocks=12)
        world.executor.crash()
        await large.done.wait()
        assert isinstance(large.error, EngineUnavailableError)
        assert world.loop.scheduler.num_waiting == 0
        small = world.submit(2)
        await small.done.wait()
        assert small.outputs[0].token_ids == expected(2)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("told", "asked_for", "expected_depth"), [(None, 0, 2), (None, 4, 4), (3, 4, 3), (1, 0, 1), (None, 2, 2)]
)
async def test_as_many_plans_are_ahead_as_the_settings_say_or_else_the_executor(
    told: int | None, asked_for: int, expected_depth: int
) -> None:
    depths = []
    async with running(SchedulerConfig(max_plans_in_flight=told), max_plans_in_flight=asked_for) as world:
        world.executor.on_plan = lambda plan: depths.append(world.loop.scheduler.num_plans_in_flight)
        client = world.submit(1)
        await client.done.wait()
    assert max(depths) == expected_depth
    assert client.outputs[0].token_ids == expected(1)
