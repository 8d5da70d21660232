"""Beam search through the offline engine against transformers' `generate`: the same sequences with the same scores."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle import PROMPTS, oracle
from tiny import load_oracle
from trivium import LLM, RequestOutput, SamplingParams, TokensPrompt
from trivium.params import BeamSettings

CASES_PER_FAMILY = 80
FAMILIES = ("bart", "t5", "t5_gated", "llama")
SCORE_TOLERANCE = 1e-4
TIE = 1e-5  # sequences whose scores differ by less may change places


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    params: SamplingParams

    def kwargs(self) -> dict[str, Any]:
        """The same as `generate` has it."""
        params, beam = self.params, self.params.beam
        assert beam is not None
        return {
            "num_beams": beam.width,
            "length_penalty": beam.length_penalty,
            "early_stopping": beam.early_stopping,
            "num_return_sequences": params.n,
            "max_new_tokens": params.max_tokens,
            "min_new_tokens": params.min_tokens or None,
            "repetition_penalty": params.repetition_penalty,
            "no_repeat_ngram_size": params.no_repeat_ngram_size,
            "bad_words_ids": [list(ids) for ids in params.bad_words_token_ids] or None,
            "do_sample": False,
            "output_scores": True,
            "return_dict_in_generate": True,
        }


def make_case(rng: random.Random) -> Case:
    width = rng.randint(2, 8)
    max_tokens = rng.choice((1, 2, 5, 9, 14))
    params = SamplingParams(
        n=rng.choice((1, 1, width, rng.randint(1, width))),
        temperature=0.0,
        max_tokens=max_tokens,
        min_tokens=rng.choice((0, 0, rng.randint(0, max_tokens))),
        repetition_penalty=rng.choice((1.0, 1.0, 1.3, 0.8)),
        no_repeat_ngram_size=rng.choice((0, 0, 1, 2, 3)),
        bad_words_token_ids=rng.choice(((), (), ((7,), (20, 30), (100,)))),
        beam=BeamSettings(
            width=width,
            length_penalty=rng.choice((1.0, 1.0, 2.0, 0.5, 0.0, -1.0)),
            early_stopping=rng.choice((True, False, "never")),
        ),
    )
    return Case(tuple(rng.choice(PROMPTS)), params)


@pytest.fixture(scope="module")
def excused() -> Iterator[list[str]]:
    """Names of the cases that differ, but for a tie: printed, and few."""
    names: list[str] = []
    yield names
    print(f"\nbeam search: {len(names)} of {CASES_PER_FAMILY * len(FAMILIES)} cases excused as ties: {names}")
    assert len(names) <= 0.01 * CASES_PER_FAMILY * len(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_and_scores_equal_transformers(checkpoints: dict[str, Path], family: str, excused: list[str]) -> None:
    """Groups of all sizes, greedy and sampled rows in one batch, admitted as slots get free."""
    rng = random.Random(family)
    cases = [make_case(rng) for _ in range(CASES_PER_FAMILY)]
    with LLM(str(checkpoints[family]), max_num_seqs=12, max_num_batched_tokens=40, num_threads=1) as llm:
        prompts = [TokensPrompt(prompt_token_ids=list(case.prompt)) for case in cases]
        params = [case.params for case in cases]
        for position in range(0, len(prompts), 5):
            prompts.insert(position, TokensPrompt(prompt_token_ids=PROMPTS[position % 16]))
            params.insert(position, SamplingParams(temperature=position % 2, max_tokens=6, seed=position))
        outputs = llm.generate(prompts, params, use_tqdm=False)
        scheduler = llm.engine_loop.scheduler
        assert scheduler.num_held_blocks == 0 and scheduler.num_running == 0
    of_beams = [output for output, param in zip(outputs, params, strict=True) if param.beam is not None]
    model = load_oracle(checkpoints[family])
    for case, output in zip(cases, of_beams, strict=True):
        compare(case, output, model, f"{family} {case}", excused)
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        if param.beam is None and param.is_greedy:
            expected = oracle(checkpoints[family], prompt["prompt_token_ids"], max_tokens=6)
            assert output.outputs[0].token_ids == expected


def compare(case: Case, output: RequestOutput, model: Any, name: str, excused: list[str]) -> None:
    ids = torch.tensor([case.prompt])
    with torch.inference_mode():
        expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **case.kwargs())
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    assert case.params.beam is not None
    assert len(output.outputs) == case.params.n
    for choice, sequence, score in zip(
        output.outputs, expected.sequences[:, start:].tolist(), expected.sequences_scores.tolist(), strict=True
    ):
        tokens = choice.token_ids
        assert choice.cumulative_logprob is not None
        ours = choice.cumulative_logprob / len(tokens) ** case.params.beam.length_penalty
        assert abs(ours - score) <= SCORE_TOLERANCE * max(1.0, abs(score)), name
        is_filled = set(sequence[len(tokens) :]) <= {model.config.pad_token_id, model.config.eos_token_id}
        if tokens != sequence[: len(tokens)] or not is_filled:
            assert abs(ours - score) < TIE, f"{name}: {tokens}, transformers says {sequence}"
            excused.append(name)
            return


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_too_little_memory_changes_no_result(checkpoints: dict[str, Path], family: str) -> None:
    """A group that loses its blocks starts over, beside groups that do not."""
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
    params = [
        SamplingParams(n=2, temperature=0.0, max_tokens=36, min_tokens=30, beam=BeamSettings(width=2 + position % 3))
        for position in range(len(prompts))
    ]
    with LLM(str(checkpoints[family]), max_num_seqs=24, num_threads=1) as llm:
        memory = 26 * llm.model_info.block_size * _token_bytes(llm)
        expected = llm.generate(prompts, params, use_tqdm=False)
    small = {"max_model_len": 64, "kv_cache_memory_bytes": memory}
    with LLM(str(checkpoints[family]), max_num_seqs=24, num_threads=1, **small) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        scheduler = llm.engine_loop.scheduler
        assert scheduler.num_preemptions > 0 and scheduler.num_held_blocks == 0
    tokens = [[choice.token_ids for choice in output.outputs] for output in outputs]
    assert tokens == [[choice.token_ids for choice in output.outputs] for output in expected]


def _token_bytes(llm: LLM) -> int:
    """KV bytes of one token of the tiny models."""
    return {True: 2 * 2 * 32 * 4, False: 2 * 2 * 2 * 8 * 4}[llm.model_info.is_encoder_decoder]
