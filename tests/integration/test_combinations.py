"""What a request asks for says the same alone on a roomy engine and among others that ask for everything else.

Soft prompts, adapters, embeddings, beams, grammars, drafts, choices, log-probabilities and stops are drawn at random,
and run together with memory for a few of them, in chunks, with a cache of prefixes that they share.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import save_adapter, targets_of
from soft_prompts import save_soft_prompt
from tiny import save_tiny
from trivium import LLM, LoRARequest, PromptAdapterRequest, RequestOutput, SamplingParams
from trivium.beam_params import BeamSearchParams
from trivium.inputs import Prompt
from trivium.structured_outputs import StructuredOutputsParams

pytestmark = pytest.mark.xdist_group("combinations")

NUM_REQUESTS = 32
SEEDS = range(int(os.environ.get("TRIVIUM_SOAK_COMBINATIONS", "1")))
NUM_BLOCKS = 16  # one request needs up to eight, and a beam search more
BLOCK_BYTES = {"llama": 4096, "bart": 8192}
GRAMMAR = StructuredOutputsParams(regex="[a-f]{3}x?[0-9]{2,9}")
SOFT_PROMPTS = {"one": ("prompt", 5), "two": ("prompt", 20), "prefix": ("prefix", 7)}
SIZES: dict[str, dict[str, int]] = {"llama": {}, "bart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4}}
TIGHT: dict[str, dict[str, Any]] = {
    "recompute": {"max_num_batched_tokens": 24, "max_num_seqs": 8, "max_loras": 2, "max_prompt_adapters": 2},
    "swap": {"max_num_batched_tokens": 48, "max_num_seqs": 16, "swap_space": 0.01},
}


@dataclass(frozen=True)
class Wish:
    prompt: Prompt
    params: SamplingParams | BeamSearchParams
    soft_prompt: PromptAdapterRequest | None
    adapter: LoRARequest | None


class World:
    """A checkpoint with its adapters."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.checkpoint = save_tiny(family, folder / "model", with_tokenizer=True, **SIZES[family])
        self.soft_prompts: list[PromptAdapterRequest | None] = [None, None]
        for number, (name, (kind, count)) in enumerate(SOFT_PROMPTS.items(), 1):
            path = save_soft_prompt(self.checkpoint, folder / name, kind, num_tokens=count, seed=count)
            self.soft_prompts.append(PromptAdapterRequest(name, number, str(path), count))
        self.adapters: list[LoRARequest | None] = [None, None]
        for number in (1, 2, 3):
            path = save_adapter(self.checkpoint, folder / f"lora-{number}", targets_of(family), seed=number)
            self.adapters.append(LoRARequest(f"lora-{number}", number, str(path)))

    def llm(self, **settings: Any) -> LLM:
        switches = {"enable_prompt_adapter": True, "enable_lora": True, "enable_prompt_embeds": True}
        return LLM(str(self.checkpoint), num_threads=1, **switches, **settings)

    def wish(self, rng: random.Random, hidden_size: int) -> Wish:
        prompt, params = make_prompt(rng, hidden_size), make_params(rng)
        return Wish(prompt, params, rng.choice(self.soft_prompts), rng.choice(self.adapters))


def make_prompt(rng: random.Random, hidden_size: int) -> Prompt:
    """Ids with beginnings in common, a third of them around embeddings."""
    ids = [7, 8, 9, 10] * rng.choice((0, 0, 2, 4)) + [rng.randrange(4, 260) for _ in range(rng.choice((1, 3, 9, 17)))]
    if rng.random() > 0.3:
        return {"prompt_token_ids": ids}
    generator = torch.Generator().manual_seed(rng.randrange(3))
    rows = torch.randn(rng.choice((2, 18)), hidden_size, generator=generator) * 0.3
    parts: list[Any] = [{"prompt_token_ids": ids}, {"prompt_embeds": rows}, {"prompt_token_ids": ids[:3]}]
    return {"prompt_parts": parts}


def make_params(rng: random.Random) -> SamplingParams | BeamSearchParams:
    grammar = GRAMMAR if rng.random() < 0.3 else None
    if rng.random() < 0.2:
        return BeamSearchParams(beam_width=3, max_tokens=30, structured_outputs=grammar)
    wanted = {
        "prompt_logprobs": 2,
        "logprobs": 2,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "prompt_lookup_num_tokens": 3,
        "ignore_eos": True,
        "stop": [chr(rng.randrange(97, 110))],
    }
    given: dict[str, Any] = {name: value for name, value in wanted.items() if rng.random() < 0.3}
    is_sampled = rng.random() < 0.6
    return SamplingParams(
        temperature=float(is_sampled),
        n=3 if is_sampled and rng.random() < 0.4 else 1,
        seed=rng.randrange(1000),
        max_tokens=rng.choice((1, 5, 40)),
        structured_outputs=grammar,
        **given,
    )


def shown(output: RequestOutput) -> list[Any]:
    """What was said, and how many log-probabilities there are of the prompt."""
    logprobs = None if output.prompt_logprobs is None else [value is not None for value in output.prompt_logprobs]
    return [[(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in output.outputs], logprobs]


def generate(llm: LLM, wishes: list[Wish]) -> list[RequestOutput]:
    return llm.generate(
        [wish.prompt for wish in wishes],
        [wish.params for wish in wishes],
        prompt_adapter_request=[wish.soft_prompt for wish in wishes],
        lora_request=[wish.adapter for wish in wishes],
        use_tqdm=False,
    )


@pytest.fixture(scope="module", params=SIZES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("seed", SEEDS)
def test_alone_and_among_all_others(world: World, seed: int) -> None:
    rng = random.Random(seed)
    with world.llm() as llm:
        wishes = [world.wish(rng, llm.model_info.hidden_size) for _ in range(NUM_REQUESTS)]
        alone = [shown(generate(llm, [wish])[0]) for wish in wishes]
    num_preemptions = 0
    for name, settings in TIGHT.items():
        with world.llm(kv_cache_memory_bytes=NUM_BLOCKS * BLOCK_BYTES[world.family], **settings) as llm:
            together = [shown(output) for output in generate(llm, wishes)]
            llm.engine_loop.scheduler.check_invariants()
            num_preemptions += llm.engine_loop.scheduler.num_preemptions
        for wish, expected, found in zip(wishes, alone, together, strict=True):
            assert found == expected, f"{name}: {wish}"
    assert num_preemptions > 0
