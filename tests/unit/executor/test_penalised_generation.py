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
from unit.executor.test_models import add_random_requests, make_runner

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.8, "no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 1},
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


def generate(oracle: Any, request: MiniRequest) -> list[int]:
    """What transformers generates greedily for `request`."""
    ids = torch.tensor([request.encoder or request.prompt])
    extra: dict[str, Any] = {"decoder_input_ids": torch.tensor([request.prompt])} if request.encoder else {}
    oracle.generation_config.eos_token_id = None
    output = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=request.sampling.max_tokens,
        repetition_penalty=request.sampling.repetition_penalty,
        no_repeat_ngram_size=request.sampling.no_repeat_ngram_size,
        forced_eos_token_id=None,
        **extra,
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
