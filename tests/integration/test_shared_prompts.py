"""Requests with a new common prefix, sent at once: it is computed once, and each says what it says alone."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import Cluster, serve
from tiny import ENCODER_DECODER, FAMILIES, save_tiny
from trivium import LLM, ExplicitEncoderDecoderPrompt, RequestOutput, SamplingParams, TokensPrompt
from trivium.config import BLOCK_SIZE
from trivium.inputs import Prompt
from trivium.params import BeamSettings
from trivium.structured_outputs import StructuredOutputsParams

pytestmark = pytest.mark.xdist_group("swap")

PREFIX = [5 + 7 * index % 200 for index in range(3 * BLOCK_SIZE)]
NUM_REQUESTS = 8
# With the same random numbers for all: what differs, differs by its logits.
SAMPLED = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)


def own_ids(number: int) -> list[int]:
    return [20 + 9 * number + index for index in range(1 + number % 4)]


def outputs_of(outputs: Sequence[RequestOutput]) -> list[list[tuple[object, ...]]]:
    return [[(choice.text, *choice.token_ids) for choice in output.outputs] for output in outputs]


def generate_both(path: Path, prompts: list[Prompt], params: list[SamplingParams], budget: int) -> int:
    """Tokens that were not found in the cache when all came at once; what they say is what each says alone."""
    with LLM(str(path), num_threads=1, enable_prefix_caching=False) as llm:
        alone = [
            outputs_of(llm.generate(prompt, each, use_tqdm=False))[0]
            for prompt, each in zip(prompts, params, strict=True)
        ]
    with LLM(str(path), num_threads=1, max_num_batched_tokens=budget) as llm:
        assert outputs_of(llm.generate(prompts, params, use_tqdm=False)) == alone
        kv_cache = llm.engine_loop.scheduler.kv_cache
    assert len({str(choices) for choices in alone}) > len(prompts) // 2
    return kv_cache.num_prompt_tokens_queried - kv_cache.num_prompt_tokens_hit


@pytest.mark.parametrize("budget", [2048, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_prefix_is_computed_once(checkpoints: dict[str, Path], family: str, budget: int) -> None:
    """`budget` tokens a step: all prompts at once, or half of the prefix."""
    is_pair = family in ENCODER_DECODER
    with LLM(str(checkpoints[family]), num_threads=1) as llm:
        start = [llm.model_info.decoder_start_token_id] if is_pair else PREFIX[:1]
    ids = [[*start, *PREFIX[1:], *own_ids(number)] for number in range(NUM_REQUESTS)]
    prompts: list[Prompt] = [TokensPrompt(prompt_token_ids=each) for each in ids]
    if is_pair:
        source = TokensPrompt(prompt_token_ids=PREFIX[:20])
        prompts = [ExplicitEncoderDecoderPrompt(encoder_prompt=source, decoder_prompt=each) for each in prompts]  # type: ignore[arg-type]
    computed = generate_both(checkpoints[family], prompts, [SAMPLED] * NUM_REQUESTS, budget)
    assert computed == len(PREFIX) + sum(len(own_ids(number)) for number in range(NUM_REQUESTS))


def test_requests_of_every_kind_share_it(checkpoints: dict[str, Path]) -> None:
    """The one that computes it has a grammar, and others have choices, beams, lookup, and log-probabilities of it."""
    params = [
        SamplingParams(temperature=0, max_tokens=9, structured_outputs=StructuredOutputsParams(regex="[a-c]{5}")),
        SamplingParams(temperature=0.9, seed=4, max_tokens=9, n=3),
        SamplingParams(temperature=0, max_tokens=9, n=2, beam=BeamSettings(width=3)),
        SamplingParams(temperature=0, max_tokens=9, prompt_lookup_num_tokens=3),
        SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=1),
        SamplingParams(temperature=0.7, seed=3, max_tokens=9, repetition_penalty=1.3),
    ]
    prompts: list[Prompt] = [
        TokensPrompt(prompt_token_ids=[*PREFIX, *own_ids(number)]) for number in range(len(params))
    ]
    computed = generate_both(checkpoints["llama"], prompts, params, 2048)
    choices = 2 * len(own_ids(1))  # the others of the second request hold its full blocks, and count the rest
    own = sum(len(own_ids(number)) for number in range(len(params)))
    assert computed == 2 * len(PREFIX) + own + choices, "once, and once for its log-probabilities"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("shared")
    checkpoint = save_tiny("llama", folder / "llama", with_tokenizer=True, max_position_embeddings=1024)
    with serve(f"llama={checkpoint}", log=folder / "serve.log") as cluster:
        yield cluster


def numbers_of(cluster: Cluster) -> dict[str, float]:
    """The scheduler's by name; none if it does not answer."""
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        sample.name.removeprefix("trivium_scheduler_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("trivium_scheduler_")
    }


def num_computed(cluster: Cluster) -> float:
    numbers = numbers_of(cluster)
    return numbers["prefix_cache_queries_total"] - numbers["prefix_cache_hits_total"]


async def until_running(cluster: Cluster) -> None:
    for _ in range(100):
        if (await asyncio.to_thread(numbers_of, cluster)).get("requests_running"):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("no request was planned")


async def until_waiting(cluster: Cluster, count: int) -> None:
    for _ in range(100):
        if (await asyncio.to_thread(numbers_of, cluster)).get("requests_waiting") == count:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{count} requests do not wait")


@contextlib.contextmanager
def stopped_executor(cluster: Cluster) -> Iterator[psutil.Process]:
    """No plan is acknowledged meanwhile."""
    executor = cluster.children()["executor"]
    executor.suspend()
    try:
        yield executor
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            executor.resume()


class Crowd:
    """Requests with a prefix of their own; `salt` keeps it apart from those of others."""

    def __init__(self, client: openai.AsyncOpenAI, first_token: int) -> None:
        self._client = client
        self._prefix = [first_token, *PREFIX[1:]] * 8  # 24 blocks
        self.num_shared = len(self._prefix)

    async def ask(self, number: int, salt: str = "together") -> str:
        completion = await self._client.completions.create(
            model="llama",
            prompt=[*self._prefix, *own_ids(number)],
            max_tokens=30,
            temperature=0,
            extra_body={"ignore_eos": True, "cache_salt": salt},
        )
        return completion.choices[0].text

    async def ask_alone(self) -> list[str]:
        return [await self.ask(number, salt=f"alone {number}") for number in range(NUM_REQUESTS)]

    def num_own(self, numbers: Sequence[int]) -> int:
        return sum(len(own_ids(number)) for number in numbers)


@contextlib.asynccontextmanager
async def crowd_of(cluster: Cluster, first_token: int) -> AsyncIterator[Crowd]:
    async with openai.AsyncOpenAI(base_url=cluster.url, api_key="none", max_retries=0, timeout=90) as client:
        yield Crowd(client, first_token)


@pytest.mark.asyncio
async def test_the_server_computes_it_once(cluster: Cluster) -> None:
    """All plans that may be in flight are another request's, so that these are planned together."""
    async with crowd_of(cluster, 31) as crowd:
        alone = await crowd.ask_alone()
        before = num_computed(cluster)
        with stopped_executor(cluster):
            other = asyncio.create_task(crowd.ask(0, salt="other"))
            await until_running(cluster)
            tasks = [asyncio.create_task(crowd.ask(number)) for number in range(NUM_REQUESTS)]
            await until_waiting(cluster, NUM_REQUESTS)
        assert await asyncio.gather(other, *tasks) == [alone[0], *alone]
        assert len(set(alone)) > NUM_REQUESTS // 2
        once = crowd.num_shared + crowd.num_own(range(NUM_REQUESTS))
        assert num_computed(cluster) - before == crowd.num_shared + crowd.num_own([0]) + once


@pytest.mark.asyncio
async def test_others_go_on_from_the_prefix_of_a_request_that_leaves(cluster: Cluster) -> None:
    """The first request leaves while its only plan is in flight."""
    async with crowd_of(cluster, 32) as crowd:
        alone = await crowd.ask_alone()
        before = num_computed(cluster)
        with stopped_executor(cluster):
            first = asyncio.create_task(crowd.ask(0))
            await until_running(cluster)
            others = [asyncio.create_task(crowd.ask(number)) for number in range(1, NUM_REQUESTS)]
            await until_waiting(cluster, NUM_REQUESTS - 1)
            first.cancel()
            await asyncio.sleep(0.2)
        assert await asyncio.gather(*others) == alone[1:]
        assert num_computed(cluster) - before == crowd.num_shared + crowd.num_own(range(NUM_REQUESTS))
    cluster.assert_nothing_held()


@pytest.mark.asyncio
async def test_a_killed_executor_takes_the_prefix_with_it_and_it_is_computed_again_once(cluster: Cluster) -> None:
    async with crowd_of(cluster, 33) as crowd:
        alone = await crowd.ask_alone()
        with stopped_executor(cluster) as executor:
            tasks = [asyncio.create_task(crowd.ask(number)) for number in range(NUM_REQUESTS)]
            await until_waiting(cluster, NUM_REQUESTS - 1)
            executor.kill()
        assert await asyncio.gather(*tasks) == alone
        cluster.wait_ready()
        once = crowd.num_shared + crowd.num_own(range(NUM_REQUESTS))
        assert num_computed(cluster) == once, "of the executor that came: what is counted begins with it"
    cluster.assert_nothing_held()
