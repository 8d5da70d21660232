"""The Executor service over a real gRPC stream: greeting, order, takeover, bad plans, heartbeats, failure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tiny import save_tiny
from trivium import rpc, wire
from trivium.config import PROTOCOL_REVISION, ExecutorConfig, ModelInfo
from trivium.errors import ConfigurationError
from trivium.executor import server
from trivium.executor.deferred_steps import StartedStep
from trivium.executor.model_runner import ModelRunner
from trivium.ledger import ask_ledger
from trivium.params import SamplingParams
from trivium.step import ModelRunnerOutput, NewRequestData, SchedulerOutput
from trivium.v1 import executor_pb2, executor_pb2_grpc, types_pb2

Stream = grpc.aio.StreamStreamCall[executor_pb2.ExecuteCommand, executor_pb2.ExecuteEvent]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


def make_config(checkpoint: Path) -> ExecutorConfig:
    return ExecutorConfig(
        model=str(checkpoint),
        served_model_name="tiny",
        max_num_seqs=4,
        kv_cache_memory_bytes=2**20,
        block_size=4,
        num_threads=1,
    )


@contextlib.asynccontextmanager
async def running_executor(checkpoint: Path, tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to an executor that ends without error."""
    address, stop = f"unix:{tmp_path}/executor.sock", asyncio.Event()
    task = asyncio.create_task(server.serve(make_config(checkpoint), address, stop))
    try:
        async with rpc.open_channel(address) as channel:
            yield channel
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


async def open_stream(channel: grpc.aio.Channel, revision: int = PROTOCOL_REVISION) -> Stream:
    stream = executor_pb2_grpc.ExecutorStub(channel).Execute(wait_for_ready=True)
    hello = executor_pb2.ExecuteHello(scheduler_epoch=1, protocol_revision=revision)
    await stream.write(executor_pb2.ExecuteCommand(hello=hello))
    return stream


async def greet(channel: grpc.aio.Channel) -> tuple[Stream, executor_pb2.ExecuteWelcome]:
    stream = await open_stream(channel)
    event = await read(stream)
    assert event.WhichOneof("event") == "welcome"
    return stream, event.welcome


async def read(stream: Stream) -> executor_pb2.ExecuteEvent:
    event = await asyncio.wait_for(stream.read(), 10)
    assert event is not grpc.aio.EOF, await stream.code()
    return event


async def send(stream: Stream, plan: SchedulerOutput) -> None:
    await stream.write(executor_pb2.ExecuteCommand(plan=wire.plan_to_proto(plan)))


async def read_result(stream: Stream) -> ModelRunnerOutput:
    while (event := await read(stream)).WhichOneof("event") == "heartbeat":
        pass
    return wire.result_from_proto(event.result)


async def end_of(stream: Stream) -> tuple[grpc.StatusCode, str]:
    """The status that the executor ends the stream with."""
    while True:
        try:
            if await asyncio.wait_for(stream.read(), 10) is grpc.aio.EOF:
                break
        except grpc.aio.AioRpcError:
            break
    return await stream.code(), await stream.details()


def first_plan(step: int = 1, *, slot: int = 0) -> SchedulerOutput:
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    new = NewRequestData(slot, (5, 6, 7), (), 0, (1, 2, 3), sampling, 0, 8)
    return SchedulerOutput(step, (slot,), (3,), new_requests=(new,))


def decode_plan(step: int) -> SchedulerOutput:
    return SchedulerOutput(step, (0,), (1,))


@pytest.mark.asyncio
async def test_the_welcome_describes_the_model_and_health_turns_serving(checkpoint: Path, tmp_path: Path) -> None:
    async with running_executor(checkpoint, tmp_path) as channel:
        _, welcome = await greet(channel)
        info = wire.model_info_from_proto(welcome.model)
        assert (info.name, info.architecture, info.is_encoder_decoder) == ("tiny", "LlamaForCausalLM", False)
        assert info.num_blocks > 0
        assert info.eos_token_ids == (2,)
        assert welcome.executor_epoch != 0
        assert await rpc.check_health(channel, server.SERVICE_NAME)


@pytest.mark.asyncio
async def test_plans_sent_ahead_are_answered_in_order_with_the_runners_tokens(checkpoint: Path, tmp_path: Path) -> None:
    plans = [first_plan(), *(decode_plan(step) for step in range(2, 7))]
    runner = ModelRunner(make_config(checkpoint))
    expected = [runner.execute(plan) for plan in plans]
    async with running_executor(checkpoint, tmp_path) as channel:
        stream, welcome = await greet(channel)
        for plan in plans:
            await send(stream, plan)
        events = [await read(stream) for _ in plans]
    assert [wire.result_from_proto(event.result) for event in events] == expected
    assert {event.result.executor_epoch for event in events} == {welcome.executor_epoch}


@pytest.mark.asyncio
async def test_a_newer_stream_ends_the_older_one_and_finds_an_empty_batch(checkpoint: Path, tmp_path: Path) -> None:
    async with running_executor(checkpoint, tmp_path) as channel:
        older, first_welcome = await greet(channel)
        await send(older, first_plan())
        await read_result(older)
        newer, second_welcome = await greet(channel)
        assert await end_of(older) == (grpc.StatusCode.ABORTED, "a newer scheduler has taken over")
        await send(newer, first_plan())  # slot 0 again: it would be refused if it were still in use
        assert (await read_result(newer)).slots == (0,)
        assert first_welcome.executor_epoch == second_welcome.executor_epoch


@pytest.mark.asyncio
@pytest.mark.parametrize("break_plan", ["unknown slot", "column"])
async def test_a_bad_plan_ends_its_stream_and_the_executor_lives(
    checkpoint: Path, tmp_path: Path, break_plan: str
) -> None:
    message = wire.plan_to_proto(decode_plan(1))
    if break_plan == "column":
        message.scheduled_slots += b"\0"
    async with running_executor(checkpoint, tmp_path) as channel:
        stream, _ = await greet(channel)
        await stream.write(executor_pb2.ExecuteCommand(plan=message))
        code, details = await end_of(stream)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert ("slot 0" if break_plan == "unknown slot" else "column") in details
        await greet(channel)


@pytest.mark.asyncio
async def test_plans_behind_a_refused_one_are_dropped(checkpoint: Path, tmp_path: Path) -> None:
    async with running_executor(checkpoint, tmp_path) as channel:
        stream, _ = await greet(channel)
        await send(stream, decode_plan(1))
        await send(stream, first_plan(2))
        assert (await end_of(stream))[0] is grpc.StatusCode.INVALID_ARGUMENT
        again, _ = await greet(channel)
        await send(again, first_plan(1))
        assert (await read_result(again)).step == 1


@pytest.mark.asyncio
async def test_another_protocol_revision_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    async with running_executor(checkpoint, tmp_path) as channel:
        code, details = await end_of(await open_stream(channel, PROTOCOL_REVISION + 1))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert str(PROTOCOL_REVISION + 1) in details


@pytest.mark.asyncio
async def test_a_plan_before_the_hello_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    async with running_executor(checkpoint, tmp_path) as channel:
        stream = executor_pb2_grpc.ExecutorStub(channel).Execute(wait_for_ready=True)
        await send(stream, first_plan())
        assert (await end_of(stream))[0] is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.asyncio
async def test_heartbeats_come_while_a_step_is_running(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    release = threading.Event()
    start = ModelRunner.start

    def slow(runner: ModelRunner, plan: SchedulerOutput) -> StartedStep:
        release.wait(10)
        return start(runner, plan)

    monkeypatch.setattr(server, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(ModelRunner, "start", slow)
    async with running_executor(checkpoint, tmp_path) as channel:
        stream, _ = await greet(channel)
        await send(stream, first_plan())
        kinds = [(await read(stream)).WhichOneof("event") for _ in range(3)]
        release.set()
        assert kinds == ["heartbeat"] * 3
        assert (await read_result(stream)).step == 1


@pytest.mark.asyncio
async def test_a_failing_step_ends_the_stream_and_the_executor(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(runner: ModelRunner, plan: SchedulerOutput) -> StartedStep:
        raise RuntimeError("device lost")

    monkeypatch.setattr(ModelRunner, "start", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        async with running_executor(checkpoint, tmp_path) as channel:
            stream, _ = await greet(channel)
            await send(stream, first_plan())
            assert await end_of(stream) == (grpc.StatusCode.INTERNAL, "the executor failed")


@pytest.mark.asyncio
async def test_a_model_that_cannot_be_loaded_ends_serve_and_its_streams(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not a model directory"):
        async with running_executor(tmp_path, tmp_path) as channel:
            # It may be over before the stream is open, which then waits for a server to come.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    assert (await end_of(await open_stream(channel)))[0] is not grpc.StatusCode.OK


@pytest.mark.asyncio
async def test_stop_ends_the_streams_and_serve(checkpoint: Path, tmp_path: Path) -> None:
    address, stop = f"unix:{tmp_path}/executor.sock", asyncio.Event()
    task = asyncio.create_task(server.serve(make_config(checkpoint), address, stop))
    async with rpc.open_channel(address) as channel:
        stream, _ = await greet(channel)
        stop.set()
        assert await end_of(stream) == (grpc.StatusCode.UNAVAILABLE, "the executor is shutting down")
        await asyncio.wait_for(task, 10)


@pytest.mark.asyncio
async def test_a_stream_that_ends_while_its_welcome_is_written_sees_why(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[server.ExecuteStream] = []

    class NotedStream(server.ExecuteStream):
        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            super().__init__(loop)
            streams.append(self)

    to_proto = wire.model_info_to_proto

    def end_soon(info: ModelInfo) -> types_pb2.ModelInfo:
        asyncio.get_running_loop().call_soon(streams[-1].end, grpc.StatusCode.ABORTED, "ended early")
        return to_proto(info)

    monkeypatch.setattr(server, "ExecuteStream", NotedStream)
    monkeypatch.setattr(wire, "model_info_to_proto", end_soon)
    async with running_executor(checkpoint, tmp_path) as channel:
        for _ in range(5):
            assert await end_of(await open_stream(channel)) == (grpc.StatusCode.ABORTED, "ended early")


@pytest.mark.asyncio
async def test_the_ledger_counts_rows_steps_and_streams(checkpoint: Path, tmp_path: Path) -> None:
    async with running_executor(checkpoint, tmp_path) as channel:
        stream, _ = await greet(channel)
        idle = await ask_ledger(channel)
        assert idle is not None and idle.service == "executor" and idle.open_streams == 1
        assert idle.executor.occupied_slots == idle.executor.steps_done == 0
        assert 2**19 < idle.executor.kv_pool_bytes <= 2**20  # as configured, in whole blocks
        await send(stream, first_plan())
        await read_result(stream)
        busy = await ask_ledger(channel)
        assert busy is not None and busy.epoch == idle.epoch
        assert busy.executor.occupied_slots == busy.executor.steps_done == 1
        await send(stream, SchedulerOutput(2, (), (), freed_slots=(0,)))
        await read_result(stream)
        after = await ask_ledger(channel)
        assert after is not None and after.executor.occupied_slots == 0 and after.executor.steps_done == 2
