"""Messages per engine step, counted at the wire: they do not depend on how many requests run."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from toy import ToyDetokenizerClient, ToyExecutorClient, make_info
from trivium import rpc
from trivium.config import SchedulerConfig
from trivium.errors import EngineUnavailableError
from trivium.inputs import EncodedPrompt, GenerationRequest
from trivium.params import SamplingParams
from trivium.remote_engine import RemoteEngine
from trivium.scheduler.engine_loop import EngineLoop
from trivium.scheduler.server import SERVICE, SchedulerServicer
from trivium.step import SchedulerOutput
from trivium.tokenizer_client import TokenizerClient
from trivium.v1 import scheduler_pb2_grpc

NUM_GATEWAYS = 2
NUM_REQUESTS = 16  # of each gateway


async def collect(engine: RemoteEngine, seed: int) -> int:
    params = SamplingParams(seed=seed, max_tokens=60, ignore_eos=True)
    request = GenerationRequest(f"r{seed}", EncodedPrompt((5, 6, 7)), params, stream=True)
    return sum([len(delta.token_ids) async for delta in engine.generate(request)])


async def connected(name: str, address: str) -> RemoteEngine:
    engine = RemoteEngine(name=name, scheduler_address=address, tokenizer_address=f"{address}.nobody")
    await engine.start()
    while True:
        try:
            assert engine.model_info
            return engine
        except EngineUnavailableError:
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_three_messages_and_one_for_each_gateway_per_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plan out, result in, one push of ids (whose answer is the text), one batch of deltas to each gateway."""
    counts: Counter[str] = Counter()
    distribute = RemoteEngine._distribute

    def count_batch(self: RemoteEngine, batch: Any) -> None:
        counts["batches"] += 1
        distribute(self, batch)

    monkeypatch.setattr(RemoteEngine, "_distribute", count_batch)
    address = f"unix:{tmp_path}/s"
    executor = ToyExecutorClient(make_info(num_blocks=700, max_num_seqs=32, max_num_batched_tokens=256))
    detokenizer = ToyDetokenizerClient()

    def count_plan(plan: SchedulerOutput) -> None:
        counts["plans"] += 1

    executor.on_plan = count_plan
    loop = EngineLoop(executor, detokenizer, SchedulerConfig())
    async with rpc.open_channel(f"{address}.nobody") as channel:
        server = rpc.Server(address, (SERVICE,))
        servicer = SchedulerServicer("toy", loop, TokenizerClient("toy", channel), rpc.new_epoch())
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(servicer, server.grpc_server)
        await server.start()
        task = asyncio.create_task(loop.run())
        engines = [await connected("toy", address) for _ in range(NUM_GATEWAYS)]
        try:
            numbers = await asyncio.gather(
                *(collect(engine, seed) for engine in engines for seed in range(NUM_REQUESTS))
            )
        finally:
            for engine in engines:
                await engine.close()
            servicer.drain()
            await server.stop(0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    num_tokens = NUM_GATEWAYS * NUM_REQUESTS * 60
    assert sum(numbers) == num_tokens
    assert counts["plans"] <= num_tokens / 8, "requests of both gateways share their steps"
    assert len(detokenizer.pushes) <= counts["plans"] + 1
    assert counts["batches"] <= NUM_GATEWAYS * (counts["plans"] + 1)
