"""A step on a GPU, on a device without memory: every tensor is there, nothing of the host comes between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from one_device import META, OneDevice, no_gpu
from quantized_checkpoints import quantized
from tiny import BART_LIKE, T5_LIKE, save_tiny
from tiny_decoders import DECODER_BUILDERS
from trivium.config import ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor import transfers, truncation
from trivium.executor.history import History
from trivium.executor.logits_processors import edit_logits, force_scores
from trivium.executor.model_config import SpecialTokens
from trivium.executor.model_runner import ModelRunner
from trivium.executor.platform import Platform, choose_device
from trivium.executor.sampler import DrawLimits, RowSampling, sample_rows
from trivium.params import SamplingParams
from trivium.step import NewRequestData, SchedulerOutput
from trivium_kernels.dispatch import select_kernels
from unit.executor.mini_scheduler import MiniScheduler
from unit.executor.parity import add_random_requests

__all__ = ["no_gpu"]

_WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")  # how many rows an expert has is asked of the device
DECODERS = tuple(family for family in DECODER_BUILDERS if family not in _WITH_EXPERTS)
EVERYTHING = SamplingParams(
    temperature=1.0,
    seed=1,
    min_tokens=3,
    logit_bias={5: 1.0},
    bad_words_token_ids=((6,), (7, 8)),
    no_repeat_ngram_size=2,
    encoder_no_repeat_ngram_size=2,
    suppress_tokens=(9,),
    begin_suppress_tokens=(10,),
    repetition_penalty=1.2,
    encoder_repetition_penalty=1.1,
    frequency_penalty=0.5,
    presence_penalty=0.5,
    dry_multiplier=1.0,
    typical_p=0.9,
    top_a=0.1,
    epsilon_cutoff=3.0,
    eta_cutoff=3.0,
)


class Recorder:
    """Runs what was recorded again."""

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, work: Callable[[], Tensor]) -> Recorder.Recording:
        return self.Recording(self, work)

    @dataclass
    class Recording:
        recorder: Recorder
        work: Callable[[], Tensor]

        def replay(self) -> Tensor:
            self.recorder.num_replays += 1
            return self.work()


def make_runner(path: Path, recorder: Recorder | None = None, **settings: object) -> ModelRunner:
    config = ExecutorConfig(
        model=str(path),
        served_model_name="tiny",
        max_num_seqs=8,
        kv_cache_memory_bytes=8 * 2**20,
        block_size=4,
        **settings,  # type: ignore[arg-type]
    )
    kernels = select_kernels(torch.device("cuda"))
    return ModelRunner(config, choose=lambda *_: Platform(META, torch.bfloat16, kernels, True, recorder))


@pytest.mark.parametrize("family", DECODERS + BART_LIKE + T5_LIKE)
def test_steps_of_a_family_stay_on_the_device(family: str, no_gpu: list[str], tmp_path: Path) -> None:
    recorder = Recorder()
    scheduler = MiniScheduler(make_runner(save_tiny(family, tmp_path), recorder, max_model_len=64))
    requests = add_random_requests(scheduler, count=3)
    with OneDevice():
        for _ in range(4):
            scheduler.step()
    assert all(request.output for request in requests)
    assert "_attend_single_kernel" in no_gpu
    assert scheduler.info.dtype == "bfloat16"
    assert recorder.num_replays >= 1


def test_a_mixture_of_experts_is_not_recorded(no_gpu: list[str], tmp_path: Path) -> None:
    runner = make_runner(save_tiny("mixtral", tmp_path), Recorder())
    assert runner._deferred is not None and runner._deferred._graphs is None
    assert not runner._model.can_be_recorded


def test_steps_are_queued_before_the_results_of_earlier_ones(
    no_gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that has come is looked at, and what a step is told goes up in one copy."""
    runner = make_runner(save_tiny("llama", tmp_path))
    uploads: list[str] = []
    for name in ("upload", "upload_all"):
        plain = getattr(transfers, name)
        monkeypatch.setattr(transfers, name, lambda *args, name=name, plain=plain: uploads.append(name) or plain(*args))
    sampling = SamplingParams(temperature=0.5, top_k=5, max_tokens=9, seed=1, ignore_eos=True)
    new = tuple(NewRequestData(slot, (5, 6, 7), (), 0, (2 * slot, 2 * slot + 1), sampling, 0, 9) for slot in range(2))
    with OneDevice():
        steps = [runner.start(SchedulerOutput(1, (0, 1), (3, 3), new))]
        uploads.clear()
        steps += [runner.start(SchedulerOutput(step, (0, 1), (1, 1))) for step in range(2, 6)]
    assert uploads == ["upload_all"] * 4
    assert not any(step.is_done for step in steps)
    assert steps[2].result().step == 3
    assert [step.is_done for step in steps] == [True, True, True, False, False]
    assert all(step.result().slots == (0, 1) for step in steps)


def test_a_row_that_ended_in_a_step_on_its_way_says_nothing_more(no_gpu: list[str], tmp_path: Path) -> None:
    """Downloads are zeros, so a stop at 0 ends the row in its first step, while the next ones are queued already."""
    runner = make_runner(save_tiny("llama", tmp_path))
    stops = SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=(0,), ignore_eos=True)
    goes_on = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    new = tuple(
        NewRequestData(slot, (5, 6, 7), (), 0, (2 * slot, 2 * slot + 1), sampling, 0, 9)
        for slot, sampling in enumerate((stops, goes_on))
    )
    steps = [runner.start(SchedulerOutput(1, (0, 1), (3, 3), new))]
    steps += [runner.start(SchedulerOutput(step, (0, 1), (1, 1))) for step in (2, 3)]
    assert [step.result().slots for step in steps] == [(0, 1), (1,), (1,)]
    again = replace(new[1], slot=0, block_ids=(4, 5))
    steps = [runner.start(SchedulerOutput(4, (0, 1), (3, 1), (again,), freed_slots=(0,)))]
    assert sorted(steps[0].result().slots) == [0, 1]


def test_a_result_does_not_reach_the_next_row_of_its_slot(no_gpu: list[str], tmp_path: Path) -> None:
    runner = make_runner(save_tiny("llama", tmp_path))
    stops = SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=(0,), ignore_eos=True)
    new = NewRequestData(0, (5, 6, 7), (), 0, (0, 1), stops, 0, 9)
    first = runner.start(SchedulerOutput(1, (0,), (3,), (new,)))
    later = replace(new, block_ids=(2, 3), sampling=replace(stops, stop_token_ids=()))
    second = runner.start(SchedulerOutput(2, (0,), (3,), (later,), freed_slots=(0,)))
    assert first.result().slots == second.result().slots == (0,)
    assert runner.execute(SchedulerOutput(3, (0,), (1,))).slots == (0,)


def test_weights_of_one_byte_are_multiplied_by_their_kernel(no_gpu: list[str], tmp_path: Path) -> None:
    scheduler = MiniScheduler(make_runner(save_tiny("llama", tmp_path), quantization="int8"))
    add_random_requests(scheduler, count=2)
    with OneDevice():
        scheduler.step()
    assert "_byte_linear_kernel" in no_gpu


@pytest.mark.parametrize(
    ("form", "kernel"), [("gptq-own-order", "_int4_linear_kernel"), ("fp8-tensor", "_byte_linear_kernel")]
)
def test_packed_weights_are_multiplied_by_their_kernels(
    form: str, kernel: str, no_gpu: list[str], tmp_path: Path
) -> None:
    """In recorded steps, too, which a look at a value would end."""
    path, _ = quantized("llama", form, tmp_path)
    recorder = Recorder()
    scheduler = MiniScheduler(make_runner(path, recorder))
    add_random_requests(scheduler, count=2)
    with OneDevice():
        for _ in range(3):
            scheduler.step()
    assert kernel in no_gpu
    assert recorder.num_replays >= 1


def test_what_edits_logits_stays_on_the_device(no_gpu: list[str]) -> None:
    logits = torch.empty((2, 64), device=META)
    tokens = np.array([[-1, 5, 6, 5, 6], [4, 5, 6, 7, 5]])
    history = History(tokens, np.array([4, 5]), np.array([1, 5]), [np.array([5, 6, 7]), np.array([8, 9])])
    special = SpecialTokens(eos=(2,), bos=None, pad=None, decoder_start=None, forced_bos=11, forced_eos=2)
    params = [EVERYTHING, SamplingParams(allowed_token_ids=(4, 5, 6))]
    with OneDevice():
        edit_logits(logits, params, history, special)
        force_scores(logits, params, np.array([1, 5]), np.array([0, 0]), special, np.array([9, 1]))
        truncation.truncate(logits, params)


@pytest.mark.parametrize(("top_k", "excludes_top"), [(0, False), (5, False), (0, True), (5, True)])
def test_draws_stay_on_the_device(
    top_k: int, excludes_top: bool, no_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all rows are drawn alike is asked of the device; here it says yes to each question in turn."""
    columns = [torch.empty(2, dtype=dtype, device=META) for dtype in (torch.int64, torch.float32, torch.float64)]
    limits = DrawLimits(columns[0], columns[1], columns[2], columns[2])
    flags = torch.empty(2, dtype=torch.bool, device=META)
    sampling = RowSampling(columns[1], columns[1], flags, limits, {1: EVERYTHING})
    wanted = 2 * excludes_top + (bool(top_k))
    answers = iter([True, *[False] * (2 * wanted), *[True] * 9])
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: next(answers))
    with OneDevice():
        token_ids = sample_rows(torch.empty((2, 400), device=META), sampling)
    assert token_ids.device == META


def test_a_tensor_of_the_host_in_a_step_is_found() -> None:
    weight = torch.empty((4, 4), device=META)
    with OneDevice(), pytest.raises(AssertionError, match="tensor of the host"):
        weight.index_select(0, torch.tensor([1, 2]))
    with OneDevice(), pytest.raises(RuntimeError):
        weight.sum().item()


def test_a_model_of_transformers_is_refused_with_the_reason(no_gpu: list[str], tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    from tiny import save_model

    config = CohereConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    save_model(CohereForCausalLM(config), tmp_path)
    with pytest.raises(ConfigurationError, match="models of transformers run on device 'cpu' only"):
        make_runner(tmp_path)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(name).type for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]
