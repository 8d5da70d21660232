"""Penalties through the whole runner: token for token what transformers generates, whatever interrupts it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import load_oracle, save_tiny
from trivium.params import SamplingParams
from unit.executor.mini_scheduler import MiniRequest, MiniScheduler
from unit.executor.test_models import add_random_requests, make_runner, random_ids

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.8, "no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 1},
    {},
]
ENCODER_KINDS: list[dict[str, Any]] = [
    {"encoder_repetition_penalty": 1.6, "repetition_penalty": 1.4},
    {"encoder_no_repeat_ngram_size": 1, "forced_bos_token_id": 9},
    {"encoder_no_repeat_ngram_size": 2, "no_repeat_ngram_size": 2, "suppress_tokens": tuple(range(4, 60))},
    {"begin_suppress_tokens": tuple(range(0, 260, 2)), "encoder_repetition_penalty": 0.6},
    {"forced_bos_token_id": 60, "begin_suppress_tokens": tuple(range(1, 260, 2)), "min_tokens": 5},
    {"forced_bos_token_id": 2, "bad_words_token_ids": ((2,), (70,), (60, 61)), "encoder_repetition_penalty": 1.9},
    {},
]


@pytest.fixture(scope="module", params=["llama", "bart"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


def mixed_requests(scheduler: MiniScheduler, sampling: SamplingParams = GREEDY) -> list[MiniRequest]:
    """One request of each kind, of different lengths."""
    requests = add_random_requests(scheduler, len(KINDS), sampling=sampling)
    for request, kind in zip(requests, KINDS, strict=True):
        request.sampling = replace(sampling, **kind)
    return requests


def generate(oracle: Any, request: MiniRequest, **settings: Any) -> list[int]:
    """What transformers generates greedily for `request`; `settings` replace those of the test and the checkpoint."""
    ids = torch.tensor([request.encoder or request.prompt])
    extra: dict[str, Any] = {"decoder_input_ids": torch.tensor([request.prompt])} if request.encoder else {}
    oracle.generation_config.eos_token_id = settings.pop("eos_token_id", None)
    forced_bos, words = request.sampling.forced_bos_token_id, request.sampling.bad_words_token_ids
    if forced_bos is not None:
        extra["forced_bos_token_id"] = forced_bos
    output = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=request.sampling.max_tokens,
        min_new_tokens=request.sampling.min_tokens or None,
        repetition_penalty=request.sampling.repetition_penalty,
        no_repeat_ngram_size=request.sampling.no_repeat_ngram_size,
        encoder_repetition_penalty=request.sampling.encoder_repetition_penalty,
        encoder_no_repeat_ngram_size=request.sampling.encoder_no_repeat_ngram_size,
        bad_words_ids=[list(word) for word in words] or None,
        suppress_tokens=list(request.sampling.suppress_tokens) or None,
        begin_suppress_tokens=list(request.sampling.begin_suppress_tokens) or None,
        **{"forced_eos_token_id": None, **extra, **settings},
    )
    return output[0].tolist()[len(request.prompt) :]


def test_greedy_output_equals_generate(checkpoint: Path) -> None:
    oracle, scheduler = load_oracle(checkpoint), MiniScheduler(make_runner(checkpoint))
    requests = mixed_requests(scheduler)
    scheduler.run()
    expected = [generate(oracle, request) for request in requests]
    assert [request.output for request in requests] == expected
    plain = [generate(oracle, MiniRequest(r.prompt, GREEDY, encoder=r.encoder)) for r in requests]
    assert sum(a != b for a, b in zip(plain, expected, strict=True)) >= 3  # or the penalties were not tested


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("num_prompt", [1, 3])
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_encoder_side_parameters_in_one_batch_equal_generate(
    family: str, num_prompt: int, ignore_eos: bool, tmp_path: Path
) -> None:
    """BART forces a BOS of its own, T5 none; without `ignore_eos` BART ends with a forced EOS."""
    path = save_tiny(family, tmp_path)
    oracle, scheduler = load_oracle(path), MiniScheduler(make_runner(path))
    start = scheduler.info.decoder_start_token_id
    assert start is not None
    settings = {} if ignore_eos else {"eos_token_id": 2, "forced_eos_token_id": 2 if family == "bart" else None}
    requests = []
    for index, kind in enumerate(ENCODER_KINDS):
        sampling = replace(GREEDY, ignore_eos=ignore_eos, **kind)
        prompt, encoder = [start, 60, 61][:num_prompt], tuple(random_ids(4 + 5 * index, seed=index))
        requests.append(scheduler.add(prompt, sampling, encoder=encoder))
    scheduler.run()
    assert [r.output for r in requests] == [generate(oracle, request, **settings) for request in requests]
    plain = [generate(oracle, MiniRequest(r.prompt, GREEDY, encoder=r.encoder), **settings) for r in requests]
    assert sum(request.output != other for request, other in zip(requests, plain, strict=True)) >= (
        5 if num_prompt == 1 else 3
    )
    if num_prompt == 1:
        assert [requests[row].output[0] for row in (1, 4, 5)] == [9, 60, 2]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_preemption_and_resume_change_no_token(checkpoint: Path, temperature: float) -> None:
    sampling = replace(
        GREEDY,
        temperature=temperature,
        seed=11,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        dry_multiplier=0.8,
        xtc_probability=0.5,
        xtc_threshold=0.05,
        typical_p=0.95,
    )
    runner = make_runner(checkpoint)
    undisturbed = MiniScheduler(runner)
    expected = mixed_requests(undisturbed, sampling)
    undisturbed.run()
    runner.reset()
    scheduler = MiniScheduler(runner)
    requests = mixed_requests(scheduler, sampling)
    for _ in range(7):
        scheduler.step()
    for request in requests[1:4]:
        scheduler.preempt(request)
    scheduler.run()
    assert [request.output for request in requests] == [request.output for request in expected]
