"""What a GPU runs, on a CPU: models with the Triton kernels, in Triton's interpreter, which is as slow as it is exact.

The interpreter is chosen for a whole process, so the tests of this folder start a run of themselves with it.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_checks import TRITON, only_triton
from tiny import save_tiny
from trivium.config import ExecutorConfig
from trivium.executor.model_runner import ModelRunner
from trivium.executor.platform import Platform
from trivium.params import SamplingParams
from trivium_kernels.dispatch import select_kernels
from unit.executor.mini_scheduler import MiniRequest, MiniScheduler

FOLDER = Path(__file__).parent
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, logprobs=0)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=4, seed=7, top_k=20, top_p=0.9)
TINY = {
    "llama": {"num_hidden_layers": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
}


@pytest.mark.skipif(TRITON, reason="this is that run")
@pytest.mark.timeout(600)
def test_the_gpu_path_passes_in_the_interpreter() -> None:
    faulthandler.cancel_dump_traceback_later()  # each test of the other process has that watchdog for itself
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(FOLDER)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=env, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-5000:]


def make_runner(path: Path, dtype: torch.dtype | None, **settings: object) -> ModelRunner:
    """dtype: None for the CPU's own path."""
    torch.set_num_threads(1)
    config = ExecutorConfig(
        model=str(path),
        served_model_name="tiny",
        max_num_seqs=4,
        kv_cache_memory_bytes=2**20,
        block_size=4,
        **settings,  # type: ignore[arg-type]
    )
    if dtype is None:
        return ModelRunner(config)
    kernels = select_kernels(torch.device("cuda"))
    return ModelRunner(config, choose=lambda *_: Platform(torch.device("cpu"), dtype, kernels, is_gpu=True))


def add_requests(scheduler: MiniScheduler, *samplings: SamplingParams) -> list[MiniRequest]:
    start = scheduler.info.decoder_start_token_id
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    if start is None:
        return [scheduler.add(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=False)]
    return [
        scheduler.add([start], sampling, encoder=tuple(prompt))
        for prompt, sampling in zip(prompts, samplings, strict=False)
    ]


@only_triton
@pytest.mark.parametrize("family", TINY)
def test_tokens_in_float32_are_those_of_the_cpu(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path, **TINY[family])
    outputs = []
    for dtype in (None, torch.float32):
        scheduler = MiniScheduler(make_runner(path, dtype))
        requests = add_requests(scheduler, GREEDY, SAMPLED)
        scheduler.run()
        outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]


@only_triton
@pytest.mark.parametrize("settings", [{}, {"quantization": "int8"}])
def test_log_probabilities_in_bfloat16_are_near_those_of_the_cpu(settings: dict[str, str], tmp_path: Path) -> None:
    """As near as 8 bits of weights and activations are: of the same first token, whatever is likely after it."""
    path = save_tiny("llama", tmp_path, **TINY["llama"])
    found = []
    for dtype in (None, torch.bfloat16):
        runner = make_runner(path, dtype, **settings)
        scheduler = MiniScheduler(runner)
        add_requests(scheduler, SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, allowed_token_ids=(65,)))
        (logprobs,) = scheduler.step().logprobs
        assert logprobs.sampled is not None
        found.append(logprobs.sampled.logprob)
        assert runner.model_info.dtype == ("float32" if dtype is None else "bfloat16")
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], abs=0.1)
