"""What services say they hold: numbers that follow what is done to them, and no answer that is waited for long."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc.aio
import pytest

from tiny import save_tiny
from toy import ToyDetokenizerClient, ToyExecutorClient, make_info
from trivium import rpc
from trivium.config import SchedulerConfig
from trivium.engine_args import EngineArgs
from trivium.inputs import EncodedPrompt, GenerationRequest
from trivium.ledger import ask_ledger, register_ledger
from trivium.local_engine import LocalEngine
from trivium.outputs import ChoiceDelta
from trivium.params import SamplingParams
from trivium.remote_engine import RemoteEngine
from trivium.scheduler import executor_client
from trivium.scheduler.engine_loop import EngineLoop
from trivium.scheduler.executor_client import GrpcExecutorClient
from trivium.scheduler.server import SERVICE, SchedulerServicer
from trivium.step import ModelRunnerOutput
from trivium.tokenizer_client import TokenizerClient
from trivium.v1 import scheduler_pb2_grpc
from trivium.v1.ledger_pb2 import ExecutorLedger, LedgerReply, SchedulerLedger

EPOCH = 2**64 - 1


def make_generation(max_tokens: int = 6, *, prompt: tuple[int, ...] = (5, 6, 7)) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=3, ignore_eos=True)
    return GenerationRequest("r", EncodedPrompt(prompt), sampling, stream=True)


async def fill_nothing(reply: LedgerReply) -> None: ...


@contextlib.asynccontextmanager
async def serving(server: rpc.Server) -> AsyncIterator[grpc.aio.Channel]:
    await server.start()
    try:
        async with rpc.open_channel(server.address) as channel:
            yield channel
    finally:
        await server.stop(0.1)


class PausingExecutor(ToyExecutorClient):
    """Gives no results while `go` is clear."""

    def __init__(self) -> None:
        super().__init__(make_info())
        self.go = asyncio.Event()
        self.go.set()

    async def next_result(self) -> ModelRunnerOutput:
        await self.go.wait()
        return await super().next_result()


@contextlib.asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[tuple[RemoteEngine, PausingExecutor]]:
    """An engine with a session to a scheduler of its own; nobody is the tokenizer."""
    executor, nobody = PausingExecutor(), f"unix:{tmp_path}/nobody"
    loop = EngineLoop(executor, ToyDetokenizerClient(), SchedulerConfig())
    server = rpc.Server(f"unix:{tmp_path}/s", (SERVICE,))
    async with rpc.open_channel(nobody) as channel:
        servicer = SchedulerServicer("toy", loop, TokenizerClient("toy", channel), EPOCH)
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(servicer, server.grpc_server)
        register_ledger(server, "scheduler", EPOCH, servicer.fill_ledger)
        async with serving(server):
            task = asyncio.create_task(loop.run())
            engine = RemoteEngine(name="toy", scheduler_address=server.address, tokenizer_address=nobody)
            await engine.start()
            try:
                yield engine, executor
            finally:
                await engine.close()
                servicer.drain()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def scheduler_of(engine: RemoteEngine, *, num_requests: int) -> SchedulerLedger:
    """The scheduler's numbers, as soon as it has a session and `num_requests` requests."""
    async with asyncio.timeout(5):
        while True:
            reply = (await engine.ledger())["scheduler"]
            ledger = SchedulerLedger() if reply is None else reply.scheduler
            if ledger.sessions == 1 and ledger.running_requests + ledger.waiting_requests == num_requests:
                return ledger
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_the_scheduler_says_what_runs_and_afterwards_that_nothing_is_held(tmp_path: Path) -> None:
    async with running(tmp_path) as (engine, executor):
        idle = await scheduler_of(engine, num_requests=0)
        assert idle.blocks_total == idle.blocks_free == 32 and idle.blocks_held == 0
        executor.go.clear()
        deltas = [engine.generate(make_generation(prompt=(5,) * 9)) for _ in range(10)]  # the toy has 8 slots
        tasks = [asyncio.create_task(anext(stream)) for stream in deltas]
        busy = await scheduler_of(engine, num_requests=10)
        assert busy.running_requests >= 1 and busy.waiting_requests >= 2
        assert busy.waiting_tokens == 9 * busy.waiting_requests
        assert busy.blocks_held >= 1 and busy.blocks_held + busy.blocks_free == 32
        executor.go.set()
        await asyncio.gather(*tasks)
        for stream in deltas:
            await stream.aclose()
        after = await scheduler_of(engine, num_requests=0)
        assert after.blocks_held == 0 and after.waiting_tokens == 0 and after.blocks_cached > 0
        assert after.prefix_tokens_queried > after.prefix_tokens_hit > 0


@pytest.mark.asyncio
async def test_a_reply_has_the_numbers_of_the_process_and_a_tokenizer_that_is_gone_is_none(tmp_path: Path) -> None:
    async with running(tmp_path) as (engine, _):
        await scheduler_of(engine, num_requests=0)
        ledger = await engine.ledger()
        assert ledger.keys() == {"scheduler", "executor", "tokenizer"}
        assert ledger["tokenizer"] is None and ledger["executor"] is None
        reply = ledger["scheduler"]
        assert reply is not None and reply.service == "scheduler" and reply.epoch == EPOCH
        assert 0 < reply.uptime_s < 60 and reply.threads >= 1 and reply.open_streams == 1
        assert reply.resident_memory_bytes > 10 * 2**20 and reply.open_file_descriptors > 3
        assert reply.asyncio_tasks > 1 and not reply.HasField("executor") and not reply.HasField("tokenizer")


@pytest.mark.asyncio
async def test_a_new_file_descriptor_and_a_new_task_are_counted(tmp_path: Path) -> None:
    server = rpc.Server(f"unix:{tmp_path}/s", ())
    register_ledger(server, "s", EPOCH, fill_nothing)
    async with serving(server) as channel:
        await ask_ledger(channel)  # connects
        before = await ask_ledger(channel)
        task = asyncio.create_task(asyncio.Event().wait())
        with (tmp_path / "file").open("w"):
            after = await ask_ledger(channel)
        task.cancel()
    assert before is not None and after is not None
    assert after.open_file_descriptors == before.open_file_descriptors + 1
    assert after.asyncio_tasks == before.asyncio_tasks + 1


@pytest.mark.asyncio
async def test_the_scheduler_asks_its_executor_and_gives_up_on_a_slow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_client, "PEER_TIMEOUT_S", 0.1)
    answer = asyncio.Event()

    async def fill(reply: LedgerReply) -> None:
        await answer.wait()
        reply.executor.CopyFrom(ExecutorLedger(occupied_slots=4))

    server = rpc.Server(f"unix:{tmp_path}/e", ())
    register_ledger(server, "executor", EPOCH, fill)
    async with serving(server):
        client = GrpcExecutorClient(server.address, 1)
        began_s = time.monotonic()
        assert await client.ledger() is None
        assert 0.05 < time.monotonic() - began_s < 1
        answer.set()
        reply = await client.ledger()
        assert reply is not None and reply.service == "executor" and reply.executor.occupied_slots == 4
        await client.close()


@pytest.mark.asyncio
async def test_a_service_whose_numbers_fail_gives_no_ledger(tmp_path: Path) -> None:
    async def fill(reply: LedgerReply) -> None:
        raise RuntimeError("a bug")

    server = rpc.Server(f"unix:{tmp_path}/s", ())
    register_ledger(server, "s", EPOCH, fill)
    async with serving(server) as channel:
        assert await ask_ledger(channel) is None


@pytest.mark.asyncio
async def test_the_local_engine_is_one_service_with_all_numbers(tmp_path: Path) -> None:
    source = str(save_tiny("llama", tmp_path / "llama", with_tokenizer=True))
    args = EngineArgs(model=source, served_model_name="tiny", kv_cache_memory_bytes=2**20, num_threads=1)
    engine = LocalEngine(args)
    unloaded = (await engine.ledger())["engine"]
    assert unloaded is not None and not unloaded.HasField("scheduler")
    await engine.start()
    try:
        seen: list[ChoiceDelta] = []
        async with aclosing(engine.generate(make_generation(50))) as deltas:
            async for delta in deltas:
                seen.append(delta)
                if len(seen) == 3:
                    break
            busy = (await engine.ledger())["engine"]
        assert busy is not None and busy.service == "engine"
        assert busy.scheduler.running_requests == busy.executor.occupied_slots == busy.tokenizer.detokenize_handles == 1
        assert busy.executor.steps_done >= 3 and busy.executor.kv_pool_bytes > 2**19
        assert list(busy.tokenizer.models) == ["tiny"]
        async for _ in engine.generate(make_generation(4)):
            pass
        async with asyncio.timeout(5):
            while (idle := (await engine.ledger())["engine"]) and idle.tokenizer.detokenize_handles:
                await asyncio.sleep(0.01)
        assert idle is not None and idle.scheduler.running_requests == idle.scheduler.blocks_held == 0
    finally:
        await engine.close()
