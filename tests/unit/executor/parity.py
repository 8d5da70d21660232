"""What the comparisons with transformers share: a runner, requests, and transformers' answer to them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trivium.config import ExecutorConfig
from trivium.executor.input_batch import InputBatch, Longs
from trivium.executor.model_runner import ModelRunner
from trivium.executor.sampler import Sampler
from trivium.params import SamplingParams
from trivium.step import ModelRunnerOutput
from unit.executor.mini_scheduler import MiniRequest, MiniScheduler

TOLERANCE = 1e-4
SAMPLINGS = (
    SamplingParams(temperature=0.0, max_tokens=8, logprobs=5),
    SamplingParams(temperature=1.0, max_tokens=8, seed=3, top_k=40, logprobs=0, prompt_logprobs=2),
    SamplingParams(temperature=1.0, max_tokens=8, seed=4, repetition_penalty=1.2),
)


def make_runner(path: Path, **settings: Any) -> ModelRunner:
    torch.set_num_threads(1)
    defaults: dict[str, Any] = {"max_num_seqs": 8, "kv_cache_memory_bytes": 8 * 2**20, "block_size": 4}
    return ModelRunner(ExecutorConfig(model=str(path), served_model_name="tiny", **{**defaults, **settings}))


def random_ids(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 260) for _ in range(length)]


def add_random_requests(scheduler: MiniScheduler, count: int = 5, **fields: Any) -> list[MiniRequest]:
    """Requests of different lengths, with an encoder input where the model has an encoder."""
    requests = []
    for index in range(count):
        ids = random_ids(1 + 6 * index, seed=index)
        if scheduler.info.is_encoder_decoder:
            start = scheduler.info.decoder_start_token_id
            assert start is not None
            requests.append(scheduler.add([start], encoder=tuple(ids), **fields))
        else:
            requests.append(scheduler.add(ids, **fields))
    return requests


def generate(oracle: Any, request: MiniRequest) -> list[int]:
    """What transformers generates greedily for the same request."""
    ids = torch.tensor([request.encoder or request.prompt])
    extra = {"decoder_input_ids": torch.tensor([request.prompt])} if request.encoder else {}
    output = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=request.sampling.max_tokens,
        **extra,
    )
    return output[0].tolist()[len(request.prompt) :]


def record_logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The list that gets the logits of every coming step, as they are before sampling."""
    recorded: list[Tensor] = []
    sample = Sampler.sample

    def record(sampler: Sampler, logits: Tensor, batch: InputBatch, slots: Longs) -> Longs:
        recorded.append(logits.clone())
        return sample(sampler, logits, batch, slots)

    monkeypatch.setattr(Sampler, "sample", record)
    return recorded


def outputs_of(runner: Any) -> list[ModelRunnerOutput]:
    """Of every step of three requests, one of each of SAMPLINGS, with their prompts in chunks."""
    scheduler = MiniScheduler(runner, chunk=7)
    requests = add_random_requests(scheduler, len(SAMPLINGS))
    for request, sampling in zip(requests, SAMPLINGS, strict=True):
        request.sampling = sampling
    outputs = []
    while scheduler.running or scheduler.waiting:
        outputs.append(scheduler.step())
    return outputs


def assert_same(found: list[ModelRunnerOutput], expected: list[ModelRunnerOutput]) -> None:
    """The same tokens, and log-probabilities within the tolerance."""
    assert [replace(output, logprobs=()) for output in found] == [replace(output, logprobs=()) for output in expected]
    pairs = [
        (mine, theirs)
        for output, other in zip(found, expected, strict=True)
        for slot, other_slot in zip(output.logprobs, other.logprobs, strict=True)
        for mine, theirs in zip((slot.sampled, *slot.prompt), (other_slot.sampled, *other_slot.prompt), strict=True)
    ]
    assert pairs
    for mine, theirs in pairs:
        if mine is None or theirs is None:
            assert mine is theirs
            continue
        assert (mine.rank, mine.top_ids) == (theirs.rank, theirs.top_ids)
        values = [mine.logprob, *mine.top_logprobs]
        assert values == pytest.approx([theirs.logprob, *theirs.top_logprobs], abs=TOLERANCE)
