"""LoRA adapters offline and served: what PEFT generates, whoever else is in the batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import openai
import psutil
import pytest
import torch

from adapters import load_peft, save_adapter, targets_of
from cluster import Cluster, serve
from oracle import PROMPTS
from trivium import LLM, LoRARequest, SamplingParams, TokensPrompt
from trivium.beam_params import BeamSearchParams
from trivium.errors import InvalidRequestError
from trivium.v1 import scheduler_pb2, scheduler_pb2_grpc, types_pb2

pytestmark = pytest.mark.xdist_group("lora")

FAMILIES = ("llama", "bart", "t5_gated")
MAX_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class World:
    checkpoint: Path
    adapters: dict[str, Path]

    def request(self, name: str) -> LoRARequest | None:
        return LoRARequest(name, 1 + list(self.adapters).index(name), str(self.adapters[name])) if name else None

    def expected(self, name: str, prompt: Sequence[int], **settings: Any) -> list[int]:
        """What PEFT generates with adapter `name`; empty for the base model."""
        model = load_peft(self.checkpoint, self.adapters.get(name))
        ids = torch.tensor([prompt])
        settings = {"num_beams": 1, "max_new_tokens": MAX_TOKENS, **settings}
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
        return [int(token) for token in output[0, 1 if model.config.is_encoder_decoder else len(prompt) :]]


@pytest.fixture(scope="module")
def worlds(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    folder = tmp_path_factory.mktemp("adapters")
    worlds = {}
    for family in FAMILIES:
        targets = targets_of(family)
        adapters = {
            name: save_adapter(checkpoints[family], folder / family / name, targets, seed=seed, r=rank)
            for seed, (name, rank) in enumerate({"one": 2, "two": 5, "three": 16}.items(), 1)
        }
        worlds[family] = World(checkpoints[family], adapters)
    return worlds


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_with_different_adapters_in_one_call(worlds: dict[str, World], family: str) -> None:
    world = worlds[family]
    names = ["one", "", "two", "three", "one", "", "three", "two"]
    prompts = [PROMPTS[index // 2] for index in range(len(names))]  # the same prompt with and without
    with LLM(str(world.checkpoint), enable_lora=True, num_threads=1) as llm:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            GREEDY,
            lora_request=[world.request(name) for name in names],
            use_tqdm=False,
        )
    expected = [world.expected(name, prompt) for name, prompt in zip(names, prompts, strict=True)]
    assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_with_too_little_memory_and_prefixes_in_common(worlds: dict[str, World], family: str) -> None:
    """Preempted, swapped, forked into two choices, found in the cache: an adapter's KV is never another's."""
    world = worlds[family]
    names = ["one", "two", ""] * 4
    prompt = [5 + index % 200 for index in range(40)]
    prompts = [TokensPrompt(prompt_token_ids=prompt[: 33 + index // 3]) for index in range(len(names))]
    params = SamplingParams(temperature=0.8, n=2, seed=7, max_tokens=24, ignore_eos=True)
    requests = [world.request(name) for name in names]
    settings = {"enable_lora": True, "num_threads": 1, "max_model_len": 80}
    with LLM(str(world.checkpoint), enable_prefix_caching=False, **settings) as llm:
        alone = [
            llm.generate(one, params, lora_request=request, use_tqdm=False)[0]
            for one, request in zip(prompts, requests, strict=True)
        ]
        config = json.loads((world.checkpoint / "config.json").read_text())
        width = config.get("d_model") or config["num_key_value_heads"] * 8
        layers = config.get("decoder_layers") or config["num_hidden_layers"]
    small = 13 * 16 * 2 * 4 * width * layers
    with LLM(str(world.checkpoint), kv_cache_memory_bytes=small, swap_space=0.01, **settings) as llm:
        together = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        assert llm.engine_loop.scheduler.num_preemptions > 0
        again = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        num_hits = llm.engine_loop.scheduler.kv_cache.num_prompt_tokens_hit
        assert num_hits > 0 or family == "bart"  # whose decoder prompts are shorter than a block
    expected = [[choice.token_ids for choice in output.outputs] for output in alone]
    assert [[choice.token_ids for choice in output.outputs] for output in together] == expected
    assert [[choice.token_ids for choice in output.outputs] for output in again] == expected
    assert len({tuple(output.outputs[0].token_ids) for output in alone[:3]}) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_with_adapters(worlds: dict[str, World], family: str) -> None:
    world, names = worlds[family], ["one", "two", ""]
    with LLM(str(world.checkpoint), enable_lora=True, num_threads=1) as llm:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=PROMPTS[3])] * 3,
            BeamSearchParams(beam_width=3, max_tokens=8),
            lora_request=[world.request(name) for name in names],
            use_tqdm=False,
        )
    expected = [world.expected(name, PROMPTS[3], num_beams=3, max_new_tokens=8) for name in names]
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_one_adapter_at_a_time_gives_the_same(worlds: dict[str, World]) -> None:
    world, names = worlds["llama"], ["one", "two", "", "one", "three"]
    with LLM(str(world.checkpoint), enable_lora=True, max_loras=1, num_threads=1) as llm:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=PROMPTS[index]) for index in range(5)],
            GREEDY,
            lora_request=[world.request(name) for name in names],
            use_tqdm=False,
        )
    expected = [world.expected(name, PROMPTS[index]) for index, name in enumerate(names)]
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_requests_for_adapters_that_cannot_be_are_refused(worlds: dict[str, World]) -> None:
    world = worlds["llama"]
    one, two = world.request("one"), world.request("two")
    assert one is not None and two is not None
    with LLM(str(world.checkpoint), num_threads=1) as llm, pytest.raises(InvalidRequestError, match="enable_lora"):
        llm.generate("a", GREEDY, lora_request=one)
    with LLM(str(world.checkpoint), enable_lora=True, max_lora_rank=8, num_threads=1) as llm:
        with pytest.raises(InvalidRequestError, match="rank 16, more than max_lora_rank 8"):
            llm.generate("a", GREEDY, lora_request=world.request("three"))
        with pytest.raises(InvalidRequestError, match="1 prompts but 2 lora_request"):
            llm.generate("a", GREEDY, lora_request=[one, two])
        llm.generate("a", GREEDY, lora_request=one, use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="has the name or number of"):
            llm.generate("a", GREEDY, lora_request=LoRARequest("two", 1, two.lora_path))
        with pytest.raises(InvalidRequestError, match="lora_int_id must be at least 1"):
            LoRARequest("x", 0, "y")


@pytest.fixture(scope="module")
def cluster(worlds: dict[str, World], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two base models, each with adapters."""
    llama, bart = worlds["llama"], worlds["bart"]

    def module(name: str, path: Path, base: str) -> str:
        return json.dumps({"name": name, "path": str(path), "base_model_name": base})

    with serve(
        *(f"llama={llama.checkpoint}", f"bart={bart.checkpoint}", "--enable-lora", "--lora-modules"),
        *(module(name, path, "llama") for name, path in llama.adapters.items()),
        *(module(f"bart-{name}", path, "bart") for name, path in bart.adapters.items()),
        log=tmp_path_factory.mktemp("lora") / "serve.log",
    ) as cluster:
        yield cluster


def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0)


def text_of(world: World, ids: list[int]) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(world.checkpoint).decode(ids, skip_special_tokens=True))


def test_models_lists_adapters_with_their_parents(cluster: Cluster) -> None:
    parents = {model.id: getattr(model, "parent", None) for model in client(cluster).models.list()}
    adapters = {name: "llama" for name in ("one", "two", "three")} | {
        f"bart-{n}": "bart" for n in ("one", "two", "three")
    }
    assert parents == {"llama": None, "bart": None, **adapters}
    assert getattr(client(cluster).models.retrieve("bart-two"), "parent") == "bart"  # noqa: B009


def test_each_adapter_is_a_model_of_its_own_name(cluster: Cluster, worlds: dict[str, World]) -> None:
    cases = [(base, name) for base in ("llama", "bart") for name in ("one", "", "two", "three")] * 2

    def complete(case: tuple[str, str]) -> tuple[str, str]:
        base, name = case
        model = (name if base == "llama" else f"bart-{name}") if name else base
        answer = client(cluster).completions.create(
            model=model, prompt=PROMPTS[5], max_tokens=MAX_TOKENS, temperature=0
        )
        return answer.model, answer.choices[0].text

    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(complete, cases))
    for (base, name), (model, text) in zip(cases, answers, strict=True):
        world = worlds[base]
        assert model == ((name if base == "llama" else f"bart-{name}") if name else base)
        assert text == text_of(world, world.expected(name, PROMPTS[5]))


def test_an_unknown_adapter_is_an_unknown_model(cluster: Cluster) -> None:
    with pytest.raises(openai.NotFoundError, match="'four' does not exist"):
        client(cluster).completions.create(model="four", prompt="a")


def scheduler_address(cluster: Cluster, model: str) -> str:
    for process in psutil.Process(cluster.process.pid).children(recursive=True):
        argv = process.cmdline()
        if "scheduler" in argv and argv[argv.index("--model") + 1] == model:
            return argv[argv.index("--listen") + 1]
    raise AssertionError(f"no scheduler of {model}")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"adapter": "two"}, "two"),
        ({"model": "three"}, "three"),
        ({"model": "llama", "adapter": "one"}, "one"),
        ({}, ""),
    ],
)
def test_adapters_over_grpc(cluster: Cluster, worlds: dict[str, World], fields: dict[str, str], name: str) -> None:
    prompt = types_pb2.SingletonPrompt(tokens=types_pb2.TokensPrompt(ids=PROMPTS[6]))
    request = scheduler_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(single=prompt),
        sampling=types_pb2.SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
        **fields,
    )
    with grpc.insecure_channel(scheduler_address(cluster, "llama")) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        ids = [token for response in stub.Generate(request, timeout=30) for token in response.delta.token_ids]
    assert ids == worlds["llama"].expected(name, PROMPTS[6])


@pytest.mark.parametrize("fields", [{"adapter": "four"}, {"model": "one", "adapter": "two"}, {"adapter": "bart-one"}])
def test_adapters_that_are_not_there_are_not_found_over_grpc(cluster: Cluster, fields: dict[str, str]) -> None:
    prompt = types_pb2.SingletonPrompt(tokens=types_pb2.TokensPrompt(ids=[5]))
    request = scheduler_pb2.GenerateRequest(prompt=types_pb2.Prompt(single=prompt), **fields)
    channel = grpc.insecure_channel(scheduler_address(cluster, "llama"))
    with channel, pytest.raises(grpc.RpcError) as caught:
        list(scheduler_pb2_grpc.SchedulerStub(channel).Generate(request, timeout=30))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_a_stream_with_an_adapter_survives_its_executor(cluster: Cluster, worlds: dict[str, World]) -> None:
    world = worlds["llama"]
    expected = text_of(world, world.expected("two", PROMPTS[2], max_new_tokens=60))
    stream = client(cluster).completions.create(
        model="two", prompt=PROMPTS[2], max_tokens=60, temperature=0, stream=True, timeout=60
    )
    text = ""
    for number, chunk in enumerate(stream):
        text += chunk.choices[0].text
        if number == 3:
            for process in psutil.Process(cluster.process.pid).children(recursive=True):
                if "executor" in process.cmdline() and any("llama=" in part for part in process.cmdline()):
                    process.kill()
    assert text == expected
