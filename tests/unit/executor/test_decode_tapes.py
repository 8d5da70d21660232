"""Decode steps on a CPU that are recorded: the same tokens as without, of every family, whatever rows come and go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tiny import save_tiny
from tiny_decoders import DECODER_BUILDERS
from trivium import LLM, BeamSearchParams
from trivium.executor import decode_tapes
from trivium.executor.decode_tapes import MAX_ROWS, DecodeTapes
from trivium.executor.model_runner import ModelRunner
from trivium.params import SamplingParams
from trivium_kernels.cpu import NativeRecorder
from unit.executor.mini_scheduler import MiniScheduler
from unit.executor.parity import add_random_requests, make_runner

FAMILIES = (*DECODER_BUILDERS, "bart", "mbart", "marian", "pegasus", "m2m_100", "blenderbot", "t5", "t5_gated", "umt5")
HAVE_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
SAMPLINGS = (
    SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1.0, max_tokens=14, ignore_eos=True, seed=3),
)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_tapes, "STEPS_BEFORE", 0)


def tapes_of(runner: ModelRunner) -> DecodeTapes | None:
    return runner._passes.tapes


def outputs(runner: ModelRunner) -> list[list[int]]:
    """Of eight requests: three come, two more later with fewer blocks, three when the others have ended."""
    scheduler = MiniScheduler(runner, seed=2)
    requests = add_random_requests(scheduler, 3, sampling=SAMPLINGS[0])
    for _ in range(4):
        scheduler.step()
    requests += add_random_requests(scheduler, 2, sampling=SAMPLINGS[1])
    scheduler.run()
    requests += add_random_requests(scheduler, 3, sampling=SAMPLINGS[1])
    scheduler.run()
    return [request.output for request in requests]


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_find_the_same_tokens(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    recorded, plain = make_runner(path), make_runner(path, enforce_eager=True)
    assert tapes_of(plain) is None
    assert outputs(recorded) == outputs(plain)
    tapes = tapes_of(recorded)
    if family in HAVE_EXPERTS:
        assert tapes is None, "which experts a token has is seen by the host"
    else:
        assert tapes is not None and tapes.num_proven >= 3


@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_beams(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path, with_tokenizer=True)
    found = []
    for enforce_eager in (False, True):
        with LLM(model=str(path), enforce_eager=enforce_eager, max_num_seqs=16) as llm:
            params = BeamSearchParams(beam_width=3, max_tokens=12)
            found.append(
                [
                    [(beam.tokens, beam.cum_logprob) for beam in output.sequences]
                    for output in llm.beam_search(["abc", "a longer one", "b"], params)
                ]
            )
    assert found[0] == found[1]


def test_int8_and_settings_that_record_nothing(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    int8 = make_runner(path, quantization="int8")
    assert outputs(int8) == outputs(make_runner(path, quantization="int8", enforce_eager=True))
    tapes = tapes_of(int8)
    assert tapes is not None and tapes.num_proven >= 3
    assert tapes_of(make_runner(path, enable_lora=True)) is None


def test_a_number_of_rows_is_recorded_when_it_has_come_up_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_tapes, "STEPS_BEFORE", 2)
    tapes = DecodeTapes(NativeRecorder(), [])
    assert [tapes.takes(rows) for rows in (1, 1, 4, 1, 4, 4)] == [False, False, False, True, False, True]
    assert not any(tapes.takes(MAX_ROWS + 1) for _ in range(9))


def run(tapes: DecodeTapes, number: float, work: Callable[[tuple[Tensor, ...]], Tensor]) -> list[float]:
    arrays: list[Any] = [np.full(2, number, np.float32)]
    found: list[float] = tapes.run(arrays, work).tolist()
    return found


def test_a_recording_that_misses_something_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    tapes = DecodeTapes(NativeRecorder(), [])
    step = count()

    def work(tensors: tuple[Tensor, ...]) -> Tensor:
        return tensors[0] * 2.0 + next(step)  # a number of the host

    assert run(tapes, 1.0, work) == [2.0, 2.0]
    with caplog.at_level(logging.WARNING):
        assert run(tapes, 5.0, work) == [11.0, 11.0]
    assert "gives other numbers" in caplog.text
    assert not tapes.takes(2)


def test_a_step_that_reads_numbers_is_run_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    tapes = DecodeTapes(NativeRecorder(), [])

    def work(tensors: tuple[Tensor, ...]) -> Tensor:
        return tensors[0] * (2.0 if tensors[0][0].item() > 3 else 1.0)

    with caplog.at_level(logging.WARNING):
        assert run(tapes, 1.0, work) == [1.0, 1.0]
    assert "depends on the numbers" in caplog.text
    assert not tapes.takes(2)


def test_a_recorder_that_fails_fails_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def record(self, work: Callable[[], Tensor]) -> Any:
            raise TypeError("what is this?")

    tapes = DecodeTapes(Failing(), [])
    with caplog.at_level(logging.WARNING):
        assert run(tapes, 1.0, lambda tensors: tensors[0] + 1.0) == [2.0, 2.0]
    assert "what is this?" in caplog.text
    assert not tapes.takes(2)


def test_tables_may_get_narrower_and_wider() -> None:
    tapes = DecodeTapes(NativeRecorder(), [4])
    widths = []

    def work(tensors: tuple[Tensor, ...]) -> Tensor:
        widths.append(tensors[1].shape[1])
        return tensors[1].sum(dim=1) + tensors[0]

    def total(*tables: list[int]) -> list[int]:
        arrays = [np.array([0, 100]), np.array(tables)]
        found: list[int] = tapes.run(arrays, work).tolist()
        return found

    assert total([1, 2], [3, 4]) == [3, 107]
    assert total([1, 2, 3], [3, 4, 5]) == [6, 112]
    assert total([5], [6]) == [10, 115], "columns that a step does not have are what they were"
    assert set(widths) == {4}
