"""Runners on the GPU path without a GPU, and requests for them: models so small that Triton's interpreter runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trivium.config import ExecutorConfig
from trivium.executor.decode_graphs import GraphRecorder
from trivium.executor.model_runner import ModelRunner
from trivium.executor.platform import Platform
from trivium.params import SamplingParams
from trivium_kernels.dispatch import select_kernels
from unit.executor.mini_scheduler import MiniRequest, MiniScheduler

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=4, seed=7, top_k=20, top_p=0.9)
# family -> what of its config makes it smaller still
TINY: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
    "t5": {"num_layers": 1, "num_decoder_layers": 1},
}
_PROMPTS = ((5, 6, 7), (9, 8, 7, 6, 5), (4, 4))


def make_runner(
    path: Path, dtype: torch.dtype | None, *, recorder: GraphRecorder | None = None, **settings: Any
) -> ModelRunner:
    """dtype: None for the CPU's own path."""
    torch.set_num_threads(1)
    config = ExecutorConfig(
        model=str(path),
        served_model_name="tiny",
        max_num_seqs=4,
        max_model_len=40,
        kv_cache_memory_bytes=2**22,
        block_size=4,
        **settings,
    )
    if dtype is None:
        return ModelRunner(config)
    return ModelRunner(config, choose=lambda *_: gpu_platform(dtype, recorder))


def gpu_platform(dtype: torch.dtype, recorder: GraphRecorder | None = None) -> Platform:
    return Platform(torch.device("cpu"), dtype, select_kernels(torch.device("cuda")), is_gpu=True, recorder=recorder)


def add_requests(
    scheduler: MiniScheduler, *samplings: SamplingParams, lens: Sequence[int] | None = None, **changes: Any
) -> list[MiniRequest]:
    """lens: max_tokens of each."""
    start = scheduler.info.decoder_start_token_id
    requests = []
    for index, sampling in enumerate(samplings):
        length = sampling.max_tokens if lens is None else lens[index]
        params, prompt = replace(sampling, max_tokens=length, **changes), _PROMPTS[index]
        if start is None:
            requests.append(scheduler.add(list(prompt), params))
        else:
            requests.append(scheduler.add([start], params, encoder=prompt))
    return requests
