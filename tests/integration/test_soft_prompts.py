"""Soft prompts offline and served: what PEFT generates, whoever else is in the batch."""

from __future__ import annotations

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

from adapters import DECODER_TARGETS, peft_warnings, save_adapter
from cluster import Cluster, serve
from embeds import soft_rows
from oracle import PROMPTS
from soft_prompts import load_soft_prompt, peft_logits, save_soft_prompt
from tiny import load_oracle, save_tiny
from trivium import LLM, LoRARequest, PromptAdapterRequest, SamplingParams, TokensPrompt
from trivium.beam_params import BeamSearchParams
from trivium.errors import ContextLengthError, InvalidRequestError
from trivium.inputs import EmbedsPrompt, Prompt
from trivium.v1 import scheduler_pb2, scheduler_pb2_grpc, types_pb2

pytestmark = [pytest.mark.xdist_group("soft"), pytest.mark.filterwarnings("ignore:Passing `")]

# PEFT guesses the shape of a prefix from the encoder, and T5's heads from the width of the model.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "bart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "t5_gated": {"d_kv": 8, "num_decoder_layers": 3},
}
MAX_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
NUM_TOKENS = {"one": 5, "two": 20, "prefix": 7}


@dataclass(frozen=True)
class World:
    checkpoint: Path
    adapters: dict[str, Path]

    def request(self, name: str) -> PromptAdapterRequest | None:
        if not name:
            return None
        return PromptAdapterRequest(
            name, 1 + list(self.adapters).index(name), str(self.adapters[name]), NUM_TOKENS[name]
        )

    def llm(self, **settings: Any) -> LLM:
        return LLM(str(self.checkpoint), enable_prompt_adapter=True, num_threads=1, **settings)

    @peft_warnings()
    def expected(self, name: str, prompt: Sequence[int], **settings: Any) -> list[int]:
        """What PEFT generates with soft prompt `name`; empty for the base model."""
        model = load_soft_prompt(self.checkpoint, self.adapters.get(name))
        ids = torch.tensor([prompt])
        settings = {"num_beams": 1, "max_new_tokens": MAX_TOKENS, **settings}
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
        return [int(token) for token in output[0, 1 if model.config.is_encoder_decoder else len(prompt) :]]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    folder = tmp_path_factory.mktemp("soft")
    worlds = {}
    for family, sizes in FAMILIES.items():
        checkpoint = save_tiny(family, folder / family / "model", with_tokenizer=True, **sizes)
        adapters = {
            name: save_soft_prompt(
                checkpoint, folder / family / name, "prefix" if name == "prefix" else "prompt", num_tokens=num, seed=num
            )
            for name, num in NUM_TOKENS.items()
        }
        worlds[family] = World(checkpoint, adapters)
    return worlds


def tokens(prompt: Sequence[int]) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=list(prompt))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_with_different_soft_prompts_in_one_call(worlds: dict[str, World], family: str) -> None:
    world = worlds[family]
    names = ["one", "", "two", "prefix", "one", "", "prefix", "two"]
    prompts = [PROMPTS[1 + index // 2] for index in range(len(names))]  # the same prompt with and without
    requests = [world.request(name) for name in names]
    with world.llm(max_num_batched_tokens=16) as llm:
        outputs = llm.generate(
            [tokens(prompt) for prompt in prompts], GREEDY, prompt_adapter_request=requests, use_tqdm=False
        )
        beams = llm.generate(
            [tokens(PROMPTS[3])] * 3,
            BeamSearchParams(beam_width=3, max_tokens=8),
            prompt_adapter_request=[world.request(name) for name in ("one", "prefix", "")],
            use_tqdm=False,
        )
    expected = [world.expected(name, prompt) for name, prompt in zip(names, prompts, strict=True)]
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert len({tuple(output) for output in expected}) > len(set(map(tuple, prompts)))
    sources = [output.encoder_prompt_token_ids or output.prompt_token_ids for output in outputs]
    assert sources == prompts  # what the caller gave, without virtual tokens
    searched = [world.expected(name, PROMPTS[3], num_beams=3, max_new_tokens=8) for name in ("one", "prefix", "")]
    assert [output.outputs[0].token_ids for output in beams] == searched


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_with_too_little_memory_and_prefixes_in_common(worlds: dict[str, World], family: str) -> None:
    """Preempted, swapped, forked into two choices, found in the cache: a soft prompt's KV is never another's."""
    world = worlds[family]
    names = ["two", "prefix", ""] * 3
    prompt = [5 + index % 200 for index in range(40)]
    prompts: list[Prompt] = [tokens(prompt[: 33 + index // 3]) for index in range(len(names))]
    params = SamplingParams(temperature=0.8, n=2, seed=7, max_tokens=24, ignore_eos=True)
    requests = [world.request(name) for name in names]
    with world.llm(max_model_len=90, enable_prefix_caching=False) as llm:
        alone = [
            llm.generate(one, params, prompt_adapter_request=request, use_tqdm=False)[0]
            for one, request in zip(prompts, requests, strict=True)
        ]
    block_bytes = 16 * 2 * 4 * (16 if family == "llama" else 32) * 2
    with world.llm(max_model_len=90, kv_cache_memory_bytes=14 * block_bytes, swap_space=0.01) as llm:
        together = llm.generate(prompts, params, prompt_adapter_request=requests, use_tqdm=False)
        assert llm.engine_loop.scheduler.num_preemptions > 0
        again = llm.generate(prompts, params, prompt_adapter_request=requests, use_tqdm=False)
        num_hits = llm.engine_loop.scheduler.kv_cache.num_prompt_tokens_hit
        assert num_hits > 0 or family == "bart"  # whose decoder prompts are shorter than a block
    expected = [[choice.token_ids for choice in output.outputs] for output in alone]
    assert [[choice.token_ids for choice in output.outputs] for output in together] == expected
    assert [[choice.token_ids for choice in output.outputs] for output in again] == expected
    assert len({tuple(output.outputs[0].token_ids) for output in alone[:3]}) == 3


def test_beams_without_a_prefix_in_the_places_of_rows_that_had_one(worlds: dict[str, World]) -> None:
    world, prompt = worlds["llama"], PROMPTS[3][:1]  # shorter than the prefix
    prefix, beams = world.request("prefix"), BeamSearchParams(beam_width=3, max_tokens=4)
    with world.llm(max_num_seqs=4) as llm:
        llm.generate([tokens(prompt)] * 4, GREEDY, prompt_adapter_request=prefix, use_tqdm=False)
        searched, _ = llm.generate(
            [tokens(prompt)] * 2, [beams, GREEDY], prompt_adapter_request=[None, prefix], use_tqdm=False
        )
    assert searched.outputs[0].token_ids == world.expected("", prompt, num_beams=3, max_new_tokens=4)


@pytest.mark.parametrize("name", ["two", "prefix"])
def test_log_probabilities_of_the_prompt_are_those_of_its_own_tokens(worlds: dict[str, World], name: str) -> None:
    world, prompt = worlds["llama"], PROMPTS[4]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    with world.llm(max_num_batched_tokens=8) as llm:
        for _ in range(2):  # the second time the prompt is in the cache
            (output,) = llm.generate(tokens(prompt), params, prompt_adapter_request=world.request(name), use_tqdm=False)
            shown = output.prompt_logprobs
            assert shown is not None and len(shown) == len(prompt) and shown[0] is None
            found = [value[token].logprob for value, token in zip(shown[1:], prompt[1:], strict=True) if value]
            logits = peft_logits(load_soft_prompt(world.checkpoint, world.adapters[name]), prompt)
            expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "name"), [("llama", "one"), ("llama", "prefix"), ("bart", "one")])
def test_a_prompt_of_embeddings_behind_a_soft_prompt(worlds: dict[str, World], family: str, name: str) -> None:
    world = worlds[family]
    rows = soft_rows(load_oracle(world.checkpoint), PROMPTS[4])
    with world.llm(enable_prompt_embeds=True) as llm:
        (output,) = llm.generate(
            [EmbedsPrompt(prompt_embeds=rows)], GREEDY, prompt_adapter_request=world.request(name), use_tqdm=False
        )
    oracle, ids = load_soft_prompt(world.checkpoint, world.adapters[name]), list[int]()
    table = load_oracle(world.checkpoint).get_input_embeddings()
    if family == "bart":
        soft = oracle.get_prompt(1)[0, : NUM_TOKENS[name]]
        both = torch.cat((soft, rows))[None].detach()
        expected = load_oracle(world.checkpoint).generate(
            inputs_embeds=both, attention_mask=torch.ones(both.shape[:2]).long(), max_new_tokens=12, num_beams=1
        )
        assert output.outputs[0].token_ids == expected[0, 1:].tolist()
        return
    while len(ids) < MAX_TOKENS and 2 not in ids:
        with torch.no_grad(), peft_warnings():
            both = torch.cat((rows, table(torch.tensor(ids, dtype=torch.long))))
            ids.append(int(oracle(inputs_embeds=both[None]).logits[0, -1].argmax()))
    assert output.outputs[0].token_ids == ids


def test_requests_for_soft_prompts_that_cannot_be_are_refused(worlds: dict[str, World]) -> None:
    world = worlds["llama"]
    one, two = world.request("one"), world.request("two")
    assert one is not None and two is not None
    with LLM(str(world.checkpoint), num_threads=1) as llm, pytest.raises(InvalidRequestError, match="enable_prompt_a"):
        llm.generate("a", GREEDY, prompt_adapter_request=one)
    with world.llm(max_prompt_adapter_token=10, enable_lora=True, max_prompt_adapters=1) as llm:
        with pytest.raises(InvalidRequestError, match="num_virtual_tokens 20 is more than max_prompt_adapter_token 10"):
            llm.generate("a", GREEDY, prompt_adapter_request=two)
        with pytest.raises(InvalidRequestError, match="1 prompts but 2 prompt_adapter_request"):
            llm.generate("a", GREEDY, prompt_adapter_request=[one, two])
        wrong = PromptAdapterRequest("one", 1, one.prompt_adapter_local_path, 4)
        with pytest.raises(InvalidRequestError, match="prompt_adapter_num_virtual_tokens is 4, but 'one' has 5"):
            llm.generate("a", GREEDY, prompt_adapter_request=wrong)
        llm.generate("a", GREEDY, prompt_adapter_request=one, use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="has the name or number of"):
            llm.generate("a", GREEDY, prompt_adapter_request=wrong)
        with pytest.raises(InvalidRequestError, match="the name 'one' is taken"):
            llm.generate("a", GREEDY, lora_request=LoRARequest("one", 1, one.prompt_adapter_local_path))
        with pytest.raises(ContextLengthError, match="context of 123 tokens"):
            llm.generate("a", SamplingParams(max_tokens=123), prompt_adapter_request=one)
        with pytest.raises(InvalidRequestError, match="prompt_adapter_num_virtual_tokens must be at least 1"):
            PromptAdapterRequest("x", 1, "y", 0)
        names = ["one", "prefix", "one", ""]  # one of them at a time
        outputs = llm.generate(
            [tokens(PROMPTS[2])] * 4,
            GREEDY,
            prompt_adapter_request=[world.request(name) for name in names],
            use_tqdm=False,
        )
        expected = [world.expected(name, PROMPTS[2]) for name in names]
        assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.fixture(scope="module")
def cluster(worlds: dict[str, World], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A model with soft prompts and a LoRA adapter."""
    world, folder = worlds["llama"], tmp_path_factory.mktemp("soft")
    lora = save_adapter(world.checkpoint, folder / "lora", DECODER_TARGETS)
    with serve(
        *(f"llama={world.checkpoint}", "--enable-prompt-adapter", "--prompt-adapters"),
        *(f"{name}={path}" for name, path in world.adapters.items()),
        *("--enable-lora", "--lora-modules", f"lora={lora}"),
        log=folder / "serve.log",
    ) as cluster:
        yield cluster


def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0)


def test_each_soft_prompt_is_a_model_of_its_own_name(cluster: Cluster, worlds: dict[str, World]) -> None:
    parents = {model.id: getattr(model, "parent", None) for model in client(cluster).models.list()}
    assert parents == {"llama": None, **dict.fromkeys((*NUM_TOKENS, "lora"), "llama")}
    cases = ["one", "", "two", "prefix"] * 2

    def complete(name: str) -> tuple[list[int], int]:
        answer = client(cluster).completions.create(
            model=name or "llama",
            prompt=PROMPTS[5],
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        assert answer.usage is not None
        return answer.choices[0].token_ids, answer.usage.prompt_tokens  # type: ignore[attr-defined]

    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(complete, cases))
    expected = [(worlds["llama"].expected(name, PROMPTS[5]), len(PROMPTS[5])) for name in cases]
    assert answers == expected


def generate_over_grpc(cluster: Cluster, **fields: Any) -> list[int]:
    for process in psutil.Process(cluster.process.pid).children(recursive=True):
        argv = process.cmdline()
        if "scheduler" in argv and "--listen" in argv:
            address = argv[argv.index("--listen") + 1]
    prompt = types_pb2.SingletonPrompt(tokens=types_pb2.TokensPrompt(ids=PROMPTS[6]))
    request = scheduler_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(single=prompt),
        sampling=types_pb2.SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
        **fields,
    )
    with grpc.insecure_channel(address) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        return [token for response in stub.Generate(request, timeout=30) for token in response.delta.token_ids]


def test_soft_prompts_over_grpc(cluster: Cluster, worlds: dict[str, World]) -> None:
    world = worlds["llama"]
    for fields, name in (
        ({"adapter": "two"}, "two"),
        ({"model": "prefix"}, "prefix"),
        ({"prompt_adapter": "one"}, "one"),
    ):
        assert generate_over_grpc(cluster, **fields) == world.expected(name, PROMPTS[6])
    both = generate_over_grpc(cluster, adapter="lora", prompt_adapter="one")
    assert both not in (generate_over_grpc(cluster, adapter="lora"), world.expected("one", PROMPTS[6]))
    for fields, code in (
        ({"prompt_adapter": "lora"}, grpc.StatusCode.NOT_FOUND),
        ({"adapter": "one", "prompt_adapter": "two"}, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            generate_over_grpc(cluster, **fields)
        assert caught.value.code() is code  # type: ignore[attr-defined]


def test_a_stream_with_a_soft_prompt_survives_executor_and_scheduler(
    cluster: Cluster, worlds: dict[str, World]
) -> None:
    world = worlds["llama"]
    for name, service in (("two", "executor"), ("prefix", "scheduler")):
        stream = client(cluster).completions.create(
            model=name,
            prompt=PROMPTS[2],
            max_tokens=60,
            temperature=0,
            stream=True,
            timeout=60,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        found: list[int] = []
        for number, chunk in enumerate(stream):
            found += chunk.choices[0].token_ids  # type: ignore[attr-defined]
            if number == 3:
                for process in psutil.Process(cluster.process.pid).children(recursive=True):
                    if service in process.cmdline():
                        process.kill()
        assert found == world.expected(name, PROMPTS[2], max_new_tokens=60, eos_token_id=None, pad_token_id=0)
