"""KV memory for a tenth of the load and host memory to swap to, and forks: every choice says what it says alone."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import Cluster, serve
from tiny import save_tiny
from trivium import LLM, ExplicitEncoderDecoderPrompt, SamplingParams, TokensPrompt
from trivium.config import BLOCK_SIZE
from trivium.executor.kv_cache import KVCache
from trivium.inputs import Prompt

pytestmark = pytest.mark.xdist_group("swap")

NUM_REQUESTS = 24
MAX_TOKENS = 50
MAX_MODEL_LEN = 96
SWAP_SPACE = 0.02  # GiB, more than the tiny models ever need


def prompt_ids(number: int) -> list[int]:
    return [5 + (11 * number + position) % 200 for position in range(8 + number % 17)]


def block_bytes(checkpoint: Path) -> int:
    config = json.loads((checkpoint / "config.json").read_text())
    if "d_model" in config:
        width, layers = config["d_model"], config["decoder_layers"]
    else:
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        width, layers = config["num_key_value_heads"] * head_dim, config["num_hidden_layers"]
    return int(BLOCK_SIZE * layers * 2 * width * 4)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_with_memory_for_a_tenth_of_the_load_every_choice_says_what_it_says_alone(
    checkpoints: dict[str, Path], family: str
) -> None:
    path = str(checkpoints[family])
    prompts: list[Prompt] = [TokensPrompt(prompt_token_ids=prompt_ids(number)) for number in range(NUM_REQUESTS)]
    if family != "llama":
        prompts = [
            ExplicitEncoderDecoderPrompt(encoder_prompt=prompt, decoder_prompt=prompt)  # type: ignore[arg-type]
            for prompt in prompts
        ]
    params = [
        SamplingParams(n=2, temperature=0.8, seed=number, max_tokens=MAX_TOKENS, ignore_eos=True)
        for number in range(NUM_REQUESTS)
    ]
    with LLM(path, max_model_len=MAX_MODEL_LEN, num_threads=1) as llm:
        alone = [
            [choice.token_ids for choice in llm.generate(prompt, each, use_tqdm=False)[0].outputs]
            for prompt, each in zip(prompts, params, strict=True)
        ]
    # Choices of 4 to 5 blocks, and with an encoder input of 1 or 2 blocks: about 200 or 250 blocks in all.
    kv_bytes = (20 if family == "llama" else 25) * block_bytes(checkpoints[family])
    with LLM(
        path,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_memory_bytes=kv_bytes,
        swap_space=SWAP_SPACE,
        num_threads=1,
    ) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        scheduler = llm.engine_loop.scheduler
        assert scheduler.num_swaps > 5
        assert scheduler.num_held_blocks == 0
        assert scheduler.kv_cache.host.num_free_blocks == llm.model_info.num_host_blocks > 0
        scheduler.check_invariants()
    assert [[choice.token_ids for choice in output.outputs] for output in outputs] == alone


@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
def test_choices_that_fork_say_what_they_say_without_a_fork(
    checkpoints: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[tuple[int, int]] = []
    copy_blocks = KVCache.copy_blocks

    def record(cache: KVCache, pairs: Sequence[tuple[int, int]]) -> None:
        copies.extend(pairs)
        copy_blocks(cache, pairs)

    monkeypatch.setattr(KVCache, "copy_blocks", record)
    prompt: Prompt = TokensPrompt(prompt_token_ids=prompt_ids(16))  # 24 tokens: a block and a half
    if family != "llama":
        prompt = ExplicitEncoderDecoderPrompt(encoder_prompt=prompt, decoder_prompt=prompt)
    params = SamplingParams(n=4, temperature=0.8, seed=1, max_tokens=30, ignore_eos=True)
    told = []
    for max_num_seqs in (1, 8):  # one after the other, a leader is gone before the next choice starts
        with LLM(str(checkpoints[family]), max_num_seqs=max_num_seqs, num_threads=1) as llm:
            choices = llm.generate(prompt, params, use_tqdm=False)[0].outputs
        told.append([choice.token_ids for choice in choices])
        assert len(copies) == (0 if max_num_seqs == 1 else 3)
    assert told[0] == told[1] and len({tuple(ids) for ids in told[0]}) == 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("swap")
    checkpoint = save_tiny("llama", folder / "llama", with_tokenizer=True)
    flags = ("--max-model-len", str(MAX_MODEL_LEN), "--swap-space", str(SWAP_SPACE))
    flags += ("--kv-cache-memory", str(10 * block_bytes(checkpoint)))
    with serve(f"llama={checkpoint}", *flags, log=folder / "serve.log") as cluster:
        yield cluster


def scrape(cluster: Cluster) -> dict[str, float]:
    """The scheduler's numbers by name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        sample.name.removeprefix("trivium_scheduler_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("trivium_scheduler_")
    }


def test_the_same_through_all_processes(cluster: Cluster) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        completion = await client.completions.create(
            model="llama",
            prompt=prompt_ids(number),
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return completion.choices[0].text

    async def ask_all() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
            alone = [await ask(client, number) for number in range(NUM_REQUESTS)]
            assert scrape(cluster)["swaps_total"] == 0
            together = await asyncio.gather(*(ask(client, number) for number in range(NUM_REQUESTS)))
        return alone, list(together)

    alone, together = asyncio.run(ask_all())
    assert together == alone and len(set(alone)) > NUM_REQUESTS // 2
    numbers = scrape(cluster)
    assert numbers["swaps_total"] > 5
    assert numbers["blocks_held"] == numbers["requests_swapped"] == 0
    assert numbers["host_blocks_free"] == numbers["host_blocks"] > 0
