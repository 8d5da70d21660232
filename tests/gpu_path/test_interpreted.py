"""What a GPU runs, on a CPU: models with the Triton kernels, in Triton's interpreter, which is as slow as it is exact.

The interpreter is chosen for a whole process, so the tests of this folder start a run of themselves with it.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_requests import GREEDY, SAMPLED, TINY, add_requests, gpu_platform, make_runner
from kernel_checks import TRITON, only_triton
from quantized_checkpoints import quantized
from shared_blocks import first_tokens
from tiny import load_oracle, save_tiny
from trivium import LLM
from trivium.executor import model_runner
from trivium.executor.deferred_steps import DeferredSteps
from trivium.executor.gpu_linear import ByteProduct, Int4Product, StackedProduct
from trivium.executor.linear import find_linears
from trivium.params import SamplingParams
from trivium.structured_outputs import StructuredOutputsParams
from unit.executor.mini_scheduler import MiniScheduler
from unit.executor.parity import random_ids

if TRITON:
    from tape import TapeRecorder

FOLDER = Path(__file__).parent
FAMILIES = ("llama", "bart")


@pytest.mark.skipif(TRITON, reason="this is that run")
@pytest.mark.timeout(600)
def test_the_gpu_path_passes_in_the_interpreter() -> None:
    faulthandler.cancel_dump_traceback_later()  # each test of the other process has that watchdog for itself
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(FOLDER)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=env, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-5000:]


@only_triton
@pytest.mark.parametrize("family", FAMILIES)
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
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_read_what_another_row_of_their_step_writes(family: str, tmp_path: Path) -> None:
    runner = make_runner(save_tiny(family, tmp_path, **TINY[family]), torch.float32)
    shared, alone = (first_tokens(runner, GREEDY, is_shared=is_shared) for is_shared in (True, False))
    assert shared == alone


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


@only_triton
@pytest.mark.parametrize(
    ("family", "form", "expected"),
    [
        ("llama", "gptq-own-order", {Int4Product, StackedProduct}),
        ("bart", "fp8-tensor", {ByteProduct}),
    ],
)
def test_packed_weights_say_what_they_mean(family: str, form: str, expected: set[type], tmp_path: Path) -> None:
    """In plain steps and recorded ones. The weights are those that they stand for, multiplied on the CPU's path."""
    path, meant = quantized(family, form, tmp_path, **TINY[family])
    recorder = TapeRecorder()
    outputs = []
    for runner in (make_runner(meant, None), make_runner(path, torch.float32, recorder=recorder)):
        scheduler = MiniScheduler(runner)
        requests = add_requests(scheduler, GREEDY, SAMPLED)
        scheduler.run()
        outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]
    assert recorder.num_replays >= 2
    linears = find_linears((runner._model.decoder, runner._model.encoder))
    assert {type(linear.product) for linear in linears if linear.weight is None} == expected


@only_triton
@pytest.mark.parametrize("form", ["gptq-own-order", "fp8-tensor"])
def test_many_rows_of_packed_weights_in_bfloat16_are_near_those_of_the_cpu(form: str, tmp_path: Path) -> None:
    """75 rows, for which weights are dequantized on the device."""
    path, meant = quantized("llama", form, tmp_path, **TINY["llama"])
    found = []
    for runner in (make_runner(meant, None), make_runner(path, torch.bfloat16)):
        scheduler = MiniScheduler(runner)
        sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, allowed_token_ids=(65,))
        for seed in range(3):
            scheduler.add(random_ids(25, seed), sampling)
        steps = scheduler.step().logprobs
        found.append([step.sampled.logprob for step in steps if step.sampled is not None])
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], rel=0.015)


@only_triton
@pytest.mark.parametrize("form", ["awq-32", "gptq-own-order", "fp8-tensor"])
def test_an_engine_with_packed_weights_says_what_transformers_says(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it generates from the weights that the packed ones stand for."""
    path, meant = quantized("llama", form, tmp_path, with_tokenizer=True, **TINY["llama"])
    monkeypatch.setattr(model_runner, "choose_platform", lambda *_: gpu_platform(torch.float32))
    llm = LLM(str(path), max_num_seqs=3, kv_cache_memory_bytes=2**19, num_threads=1, max_model_len=40)
    outputs = llm.generate(["one", "two words", "a"], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    llm.close()
    oracle = load_oracle(meant)
    for output in outputs:
        prompt = torch.tensor([output.prompt_token_ids])
        expected = oracle.generate(prompt, do_sample=False, min_new_tokens=5, max_new_tokens=5)
        assert list(output.outputs[0].token_ids) == expected[0, prompt.shape[1] :].tolist()


@only_triton
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_says_the_same_with_steps_under_way(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of all kinds, plain ones and those that need the host in every step, more than there are slots."""
    path = save_tiny(family, tmp_path, with_tokenizer=True, **TINY[family])
    settings = {"max_num_seqs": 3, "kv_cache_memory_bytes": 2**19, "num_threads": 1, "max_model_len": 40}
    samplings = [
        replace(GREEDY, max_tokens=7),
        replace(SAMPLED, max_tokens=6),
        SamplingParams(temperature=0.7, seed=1, min_p=0.1, max_tokens=5, n=2),
        replace(GREEDY, frequency_penalty=0.5, logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=[*range(100, 200)]),
        SamplingParams(temperature=0.0, max_tokens=3, structured_outputs=StructuredOutputsParams(choice=["ab", "cd"])),
        replace(GREEDY, max_tokens=9),
    ]
    prompts = ["one", "two words", "a", "bc", "def", "xyz", "and so on"]
    num_under_way: list[int] = []
    start = DeferredSteps.start

    def watched(steps: DeferredSteps, *args: Any) -> Any:
        num_under_way.append(len(steps))
        return start(steps, *args)

    monkeypatch.setattr(DeferredSteps, "start", watched)
    found = []
    for is_gpu in (False, True):
        if is_gpu:
            monkeypatch.setattr(model_runner, "choose_platform", lambda *_: gpu_platform(torch.float32))
        llm = LLM(str(path), **settings)  # type: ignore[arg-type]
        outputs = llm.generate(prompts, samplings)
        llm.close()
        found.append([(choice.token_ids, choice.finish_reason) for output in outputs for choice in output.outputs])
    assert max(num_under_way) >= 1
    assert found[0] == found[1]
