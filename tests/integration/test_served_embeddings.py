"""Vectors through the four processes: those of transformers, while others generate and processes die."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest
import torch
import torch.nn.functional as F

from cluster import Cluster, serve
from integration.test_embeddings import hidden_states
from oracle import PROMPTS, oracle
from trivium.v1 import scheduler_pb2_grpc, types_pb2

pytestmark = pytest.mark.xdist_group("details")


@pytest.fixture(scope="module")
def cluster(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    models = [f"{name}={checkpoints[name]}" for name in ("llama", "bart")]
    log = tmp_path_factory.mktemp("vectors") / "serve.log"
    with serve(*models, "--num-threads", "1", "--max-num-batched-tokens", "48", log=log) as running:
        yield running


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.asyncio
async def test_vectors_are_those_of_transformers_beside_generation(
    cluster: Cluster, checkpoints: dict[str, Path], family: str
) -> None:
    states = hidden_states(checkpoints[family], PROMPTS)
    vectors = [F.normalize(item[-1] if family == "llama" else item.mean(0), dim=0) for item in states]
    async with openai.AsyncOpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        generating = asyncio.gather(
            *(
                client.completions.create(model=family, prompt=prompt, temperature=0, max_tokens=20)
                for prompt in PROMPTS
            )
        )
        answer = await client.embeddings.create(model=family, input=PROMPTS)
        for item, vector in zip(answer.data, vectors, strict=True):
            torch.testing.assert_close(torch.tensor(item.embedding), vector, atol=1e-4, rtol=1e-4)
        completions = await generating
    for completion, prompt in zip(completions, PROMPTS, strict=True):
        assert completion.usage is not None
        assert completion.usage.completion_tokens == len(oracle(checkpoints[family], prompt))


@pytest.mark.asyncio
async def test_a_killed_executor_is_a_pause(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=cluster.url, api_key="none", max_retries=0, timeout=90) as client:
        before = await client.embeddings.create(model="llama", input=PROMPTS)
        children = cluster.children()
        victim = next(p for name, p in children.items() if "executor" in name and "llama" in " ".join(p.cmdline()))
        asking = asyncio.create_task(client.embeddings.create(model="llama", input=PROMPTS))
        victim.kill()
        after, again = await asking, await client.embeddings.create(model="llama", input=PROMPTS)
        assert [item.embedding for item in after.data] == [item.embedding for item in before.data]
        assert [item.embedding for item in again.data] == [item.embedding for item in before.data]


def test_direct_stubs_are_told_what_is_wrong(cluster: Cluster) -> None:
    argv = next(p.cmdline() for name, p in cluster.children().items() if "scheduler" in name and "llama" in p.cmdline())
    ids = types_pb2.TokenSequence
    bad = [
        types_pb2.EmbedRequest(),
        types_pb2.EmbedRequest(prompts=[ids()]),
        types_pb2.EmbedRequest(prompts=[ids(ids=[9999])]),
        types_pb2.EmbedRequest(prompts=[ids(ids=[5])], pooling_type="all"),
        types_pb2.EmbedRequest(prompts=[ids(ids=[5])], pooling_type="max"),
        types_pb2.EmbedRequest(prompts=[ids(ids=[5] * 40), ids(ids=[5] * 40)]),
    ]
    with grpc.insecure_channel(argv[argv.index("--listen") + 1]) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        for request in bad:
            with pytest.raises(grpc.RpcError) as refused:
                stub.Embed(request, timeout=20)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, request
        answer = stub.Embed(types_pb2.EmbedRequest(prompts=[ids(ids=[5, 6])]), timeout=20)
        assert len(answer.vectors) == 4 * answer.hidden_size > 0
