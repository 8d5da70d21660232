"""Prompt lookup: the same tokens in fewer steps, for greedy and seeded sampling, in any company."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from oracle import PROMPTS
from trivium import LLM, RequestOutput, SamplingParams, TokensPrompt
from trivium.errors import InvalidRequestError
from trivium.params import BeamSettings


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


def make_params(rng: random.Random) -> SamplingParams:
    """Requests of which some repeat themselves, as random models do when they are greedy or nearly so."""
    return SamplingParams(
        n=rng.choice((1, 1, 2)),
        temperature=rng.choice((0.0, 0.0, 0.2, 1.0)),
        seed=rng.randrange(1000),
        max_tokens=rng.choice((1, 2, 7, 30)),
        min_tokens=rng.choice((0, 1)),
        repetition_penalty=rng.choice((1.0, 0.4, 1.2)),
        stop_token_ids=rng.choice(((), (20, 60, 100, 140))),
        ignore_eos=rng.random() < 0.5,
        prompt_lookup_num_tokens=rng.choice((1, 3, 8)),
    )


@pytest.mark.parametrize("memory", ["enough", "too little"])
@pytest.mark.parametrize("family", ["bart", "t5", "llama", "mistral"])
def test_output_is_the_same(checkpoints: dict[str, Path], family: str, memory: str) -> None:
    rng = random.Random(family)
    prompts = [TokensPrompt(prompt_token_ids=rng.choice(PROMPTS) * rng.choice((1, 2))) for _ in range(40)]
    guessing = [make_params(rng) for _ in prompts]
    plain = [replace(params, prompt_lookup_num_tokens=0) for params in guessing]
    mixed = [rng.choice(pair) for pair in zip(guessing, plain, strict=True)]
    small = {} if memory == "enough" else {"max_model_len": 96, "kv_cache_memory_bytes": 10 * 4096}
    if memory == "too little" and family in ("bart", "t5"):
        pytest.skip("an encoder input of full length alone takes more")
    with LLM(str(checkpoints[family]), max_num_seqs=9, max_num_batched_tokens=90, num_threads=1, **small) as llm:
        loop = llm.engine_loop
        results = []
        for params in (plain, guessing, mixed):
            results.append(tokens(llm.generate(prompts, params, use_tqdm=False)))
            loop.scheduler.check_invariants()
        if memory == "too little":
            assert loop.scheduler.num_preemptions > 0
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_what_repeats_takes_fewer_steps(checkpoints: dict[str, Path], family: str) -> None:
    """A reward for repetition makes random models say the same again, as a summary does with its source."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, repetition_penalty=0.3)
    prompt = TokensPrompt(prompt_token_ids=PROMPTS[6])
    num_steps, texts = [], []
    with LLM(str(checkpoints[family]), num_threads=1) as llm:
        for lookup in (0, 8):
            before = llm.engine_loop.scheduler._step
            given = replace(params, prompt_lookup_num_tokens=lookup)
            texts.append(tokens(llm.generate(prompt, given, use_tqdm=False)))
            num_steps.append(llm.engine_loop.scheduler._step - before)
    assert texts[0] == texts[1]
    assert num_steps[1] < 0.8 * num_steps[0], num_steps


def test_beams_guess_nothing() -> None:
    with pytest.raises(InvalidRequestError, match="beam search guesses no tokens"):
        SamplingParams(temperature=0.0, prompt_lookup_num_tokens=3, beam=BeamSettings(width=2))


def test_log_probabilities_switch_it_off(checkpoints: dict[str, Path]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, logprobs=1, prompt_lookup_num_tokens=4, ignore_eos=True)
    with LLM(str(checkpoints["llama"]), num_threads=1) as llm:
        (output,) = llm.generate(TokensPrompt(prompt_token_ids=PROMPTS[4] * 3), params, use_tqdm=False)
        logprobs = output.outputs[0].logprobs
    assert logprobs is not None and len(logprobs) == 20
