"""Requests that arrive by a Poisson process: how long each waits for its last token.

This project takes them as they come. The peers get what a simple server gives them: whatever waits, up to 32 requests,
is one static batch, which runs until its longest request is done.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from checkpoints import Shape, checkpoint
from harness import random_prompts
from peers import Peer

from trivium.config import ExecutorConfig
from trivium.inputs import EncodedPrompt, GenerationRequest
from trivium.local_engine import LocalEngine
from trivium.params import SamplingParams

MAX_BATCH = 32


@dataclass(frozen=True, slots=True)
class Arrival:
    """seconds: after the start."""

    seconds: float
    prompt: list[int]
    num_tokens: int


def make_trace(shape: Shape, count: int, rate: float, seed: int = 0) -> list[Arrival]:
    """`count` requests, `rate` per second: prompts of 8 to 64 tokens, outputs of 4 to 48."""
    numbers = random.Random(seed)
    trace, now = [], 0.0
    for index in range(count):
        now += numbers.expovariate(rate)
        prompt = random_prompts(1, numbers.randint(8, 64), shape.vocab_size, seed=index)[0]
        trace.append(Arrival(now, prompt, numbers.randint(4, 48)))
    return trace


def static_rate(peer: Peer, shape: Shape) -> float:
    """Requests per second of a full static batch of 8."""
    trace = make_trace(shape, 8, 1.0)
    begin = time.perf_counter()
    peer.generate([arrival.prompt for arrival in trace], max(arrival.num_tokens for arrival in trace))
    return len(trace) / (time.perf_counter() - begin)


def static_batches(peer: Peer, trace: list[Arrival]) -> list[float]:
    """Seconds from each arrival to its last token."""
    begin, done, latencies = time.perf_counter(), 0, []
    while done < len(trace):
        now = time.perf_counter() - begin
        waiting = [arrival for arrival in trace[done : done + MAX_BATCH] if arrival.seconds <= now]
        if not waiting:
            time.sleep(trace[done].seconds - now)
            continue
        peer.generate([arrival.prompt for arrival in waiting], max(arrival.num_tokens for arrival in waiting))
        end = time.perf_counter() - begin
        latencies += [end - arrival.seconds for arrival in waiting]
        done += len(waiting)
    return latencies


def our_latencies(shape: Shape, num_threads: int) -> Callable[[list[Arrival]], list[float]]:
    """A function that runs a trace; the engine is made anew in every call, and warm when the trace begins."""

    async def run(trace: list[Arrival]) -> list[float]:
        config = ExecutorConfig(
            model=str(checkpoint(shape)), served_model_name="m", num_threads=num_threads, generation_config="none"
        )
        engine = LocalEngine(config, enable_prefix_caching=False)
        await engine.start()
        try:
            await _finish(engine, trace[0], "warm-up")
            begin = time.perf_counter()

            async def serve(index: int, arrival: Arrival) -> float:
                await asyncio.sleep(arrival.seconds - (time.perf_counter() - begin))
                await _finish(engine, arrival, str(index))
                return time.perf_counter() - begin - arrival.seconds

            return list(await asyncio.gather(*(serve(index, arrival) for index, arrival in enumerate(trace))))
        finally:
            await engine.close()

    return lambda trace: asyncio.run(run(trace))


async def _finish(engine: LocalEngine, arrival: Arrival, request_id: str) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=arrival.num_tokens, ignore_eos=True, seed=0, detokenize=False)
    async for _ in engine.generate(GenerationRequest(request_id, EncodedPrompt(tuple(arrival.prompt)), sampling)):
        pass
