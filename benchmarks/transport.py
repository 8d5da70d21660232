"""The same work in process, over Unix sockets and over TCP: python benchmarks/transport.py [--threads N]

A random Llama of 135M parameters; 8 requests of 48 tokens at once, and single requests for the time to first token. The
three ways alternate within one run; medians and ratios to in process are printed. Starts real processes on loopback.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trivium.engine import EngineClient
from trivium.engine_args import EngineArgs
from trivium.executor.threads import count_cores
from trivium.inputs import EncodedPrompt, GenerationRequest
from trivium.local_engine import LocalEngine
from trivium.params import SamplingParams
from trivium.remote_engine import RemoteEngine

NUM_REQUESTS = 8
NUM_TOKENS = 48
PROMPT = EncodedPrompt(tuple(range(10, 42)))


def save_model(path: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).half().save_pretrained(path)
    vocabulary = {f"t{index}": index for index in range(49152)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def remote(path: str, addresses: dict[str, str], threads: int) -> AsyncIterator[EngineClient]:
    """An executor, a scheduler and a tokenizer process at `addresses`, and an engine that talks to them."""
    ways = {
        "executor": ["executor", f"m={path}", "--listen", addresses["executor"], "--num-threads", str(threads)],
        "tokenizer": ["tokenizer", f"m={path}", "--listen", addresses["tokenizer"]],
        "scheduler": ["scheduler", "--model", "m", "--listen", addresses["scheduler"]],
    }
    ways["scheduler"] += ["--executor", addresses["executor"], "--tokenizer", addresses["tokenizer"]]
    processes = [
        subprocess.Popen([sys.executable, "-P", "-m", "trivium", *args, "--log-level", "error"])
        for args in ways.values()
    ]
    engine = RemoteEngine(name="m", scheduler_address=addresses["scheduler"], tokenizer_address=addresses["tokenizer"])
    try:
        await engine.start()
        while not engine.is_ready():
            await asyncio.sleep(0.1)
        yield engine
    finally:
        await engine.close()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(10)


async def first_token_and_total_seconds(engine: EngineClient, name: str, num_tokens: int) -> tuple[float, float]:
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, seed=0)
    request = GenerationRequest(name, PROMPT, sampling, stream=True, cache_salt=name)
    begin = time.perf_counter()
    first = 0.0
    async for delta in engine.generate(request):
        if delta.token_ids and not first:
            first = time.perf_counter() - begin
    return first, time.perf_counter() - begin


async def measure(engine: EngineClient, run: int) -> tuple[float, float]:
    """(tokens per second of the batch, seconds to first token of one request)."""
    first, _ = await first_token_and_total_seconds(engine, f"{run}-single", 2)
    begin = time.perf_counter()
    names = [f"{run}-{index}" for index in range(NUM_REQUESTS)]
    await asyncio.gather(*(first_token_and_total_seconds(engine, name, NUM_TOKENS) for name in names))
    return NUM_REQUESTS * NUM_TOKENS / (time.perf_counter() - begin), first


async def main(runs: int, threads: int) -> None:
    logging.disable(logging.WARNING)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model")
        save_model(path)
        names = ("executor", "tokenizer", "scheduler")
        local = LocalEngine(EngineArgs(model=path, served_model_name="m", num_threads=threads))
        await local.start()
        unix = remote(path, {name: f"unix:{folder}/{name}" for name in names}, threads)
        tcp = remote(path, {name: f"127.0.0.1:{free_port()}" for name in names}, threads)
        results: dict[str, list[tuple[float, float]]] = {"in process": [], "unix": [], "tcp": []}
        async with unix as unix_engine, tcp as tcp_engine:
            engines: dict[str, EngineClient] = {"in process": local, "unix": unix_engine, "tcp": tcp_engine}
            for run in range(runs + 1):
                for name, engine in engines.items():
                    measured = await measure(engine, run)
                    if run:  # the first one warms up
                        results[name].append(measured)
        await local.close()
    base_rate = statistics.median(rate for rate, _ in results["in process"])
    base_first = statistics.median(first for _, first in results["in process"])
    for name, measured_runs in results.items():
        rate = statistics.median(rate for rate, _ in measured_runs)
        first = statistics.median(first for _, first in measured_runs)
        print(
            f"{name:>10}: {rate:6.1f} tokens/s ({rate / base_rate:.3f} of in process), "
            f"first token {1e3 * first:.1f} ms ({1e3 * (first - base_first):+.1f} ms)"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=count_cores(), help="of the model")
    args = parser.parse_args()
    asyncio.run(main(args.runs, args.threads))
