"""All families through the four processes: token for token what transformers generates, while requests come and go."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest
from transformers import AutoTokenizer

from cluster import ROOT, Cluster, environment, serve
from oracle import PROMPTS, oracle
from tiny import FAMILIES
from trivium.v1 import scheduler_pb2, scheduler_pb2_grpc, types_pb2

pytestmark = pytest.mark.xdist_group("served")


@pytest.fixture(scope="module")
def families(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One server with a model of every family."""
    log = tmp_path_factory.mktemp("families") / "serve.log"
    models = [f"{name}={path}" for name, path in checkpoints.items()]
    with serve(*models, "--num-threads", "1", "--max-num-seqs", "6", log=log) as cluster:
        yield cluster


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.asyncio
async def test_sixteen_requests_arriving_while_others_run(
    families: Cluster, checkpoints: dict[str, Path], family: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[family])
    expected = [tokenizer.decode(oracle(checkpoints[family], prompt), skip_special_tokens=True) for prompt in PROMPTS]
    rng = random.Random(family)
    async with openai.AsyncOpenAI(base_url=families.url, api_key="none", max_retries=0) as client:

        async def one(prompt: list[int], stream: bool) -> str:
            await asyncio.sleep(rng.random() * 0.3)
            if not stream:
                whole = await client.completions.create(model=family, prompt=prompt, temperature=0, max_tokens=20)
                return whole.choices[0].text
            chunks = await client.completions.create(
                model=family, prompt=prompt, temperature=0, max_tokens=20, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in chunks])

        assert await one(PROMPTS[3], stream=True) == expected[3]
        texts = await asyncio.gather(*(one(prompt, stream=index % 2 == 0) for index, prompt in enumerate(PROMPTS)))
    assert list(texts) == expected


def llama_scheduler(families: Cluster) -> str:
    """The address that it listens on."""
    argv = next(
        process.cmdline()
        for name, process in families.children().items()
        if "scheduler" in name and "llama" in process.cmdline()
    )
    return argv[argv.index("--listen") + 1]


def test_direct_stubs_get_text(families: Cluster, checkpoints: dict[str, Path]) -> None:
    run = subprocess.run(
        [sys.executable, "-P", str(ROOT / "examples" / "generate_grpc.py"), llama_scheduler(families), "Hello"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    expected = oracle(checkpoints["llama"], tokenizer("Hello")["input_ids"], max_tokens=40)
    assert run.stdout == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_direct_stubs_are_told_once_how_much_was_cached(families: Cluster) -> None:
    tokens = types_pb2.TokensPrompt(ids=range(60, 110))
    request = scheduler_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(single=types_pb2.SingletonPrompt(tokens=tokens)),
        sampling=types_pb2.SamplingParams(n=2, max_tokens=5, ignore_eos=True),
        stream=True,
    )
    with grpc.insecure_channel(llama_scheduler(families)) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        for expected in (0, 48):
            deltas = [item.delta for item in stub.Generate(request, timeout=20) if item.HasField("delta")]
            told = [(delta.index, delta.num_cached_tokens) for delta in deltas if delta.HasField("num_cached_tokens")]
            assert told == [(0, expected)] and len(deltas) > 2


def test_direct_stubs_are_refused_what_the_model_does_not_have(families: Cluster) -> None:
    prompt = types_pb2.Prompt(single=types_pb2.SingletonPrompt(tokens=types_pb2.TokensPrompt(ids=[5, 6])))
    bad = [
        scheduler_pb2.GenerateRequest(),
        scheduler_pb2.GenerateRequest(prompt=prompt, sampling=types_pb2.SamplingParams(n=0)),
        scheduler_pb2.GenerateRequest(prompt=prompt, sampling=types_pb2.SamplingParams(allowed_token_ids=[9999])),
        scheduler_pb2.GenerateRequest(
            prompt=prompt, resume=[scheduler_pb2.ResumedChoice(index=0, output_token_ids=[5, 2**32 - 1])]
        ),
    ]
    with grpc.insecure_channel(llama_scheduler(families)) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        for request in bad:
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Generate(request, timeout=20))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, request
        assert len(list(stub.Generate(scheduler_pb2.GenerateRequest(prompt=prompt), timeout=20))) == 2


def test_bad_requests_get_one_clear_error_and_disturb_nobody(families: Cluster) -> None:
    with openai.OpenAI(base_url=families.url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model="nobody", prompt="x")
        assert unknown.value.body["code"] == "model_not_found"  # type: ignore[index]
        for prompt, code in (([5] * 500, "context_length_exceeded"), ([10_000], "invalid_token_id")):
            with pytest.raises(openai.BadRequestError) as refused:
                client.completions.create(model="llama", prompt=prompt)
            assert refused.value.body["code"] == code  # type: ignore[index]
        with pytest.raises(openai.BadRequestError) as pair:
            client.completions.create(
                model="llama", prompt="", extra_body={"prompt": None, "encoder_prompt": "a", "decoder_prompt": "b"}
            )
        assert pair.value.body["code"] == "not_encoder_decoder"  # type: ignore[index]
        assert client.completions.create(model="llama", prompt="x", max_tokens=3).usage.completion_tokens <= 3  # type: ignore[union-attr]
