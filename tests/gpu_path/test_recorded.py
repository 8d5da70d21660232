"""Decode steps that are recorded once and replayed, with a tape in place of a CUDA graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpu_requests import GREEDY, SAMPLED, TINY, add_requests, make_runner
from kernel_checks import TRITON, only_triton
from tiny import save_tiny
from trivium.executor.decode_graphs import DecodeGraphs
from trivium.executor.transfers import Array
from unit.executor.mini_scheduler import MiniScheduler

if TRITON:
    from tape import TapeRecorder

CPU = torch.device("cpu")


@only_triton
@pytest.mark.parametrize("family", TINY)
def test_recorded_steps_say_what_the_cpu_says(family: str, tmp_path: Path) -> None:
    """Rows come and go, so recordings of 1, 2 and 4 rows are used, the last one with rows that fill it up."""
    path = save_tiny(family, tmp_path, **TINY[family])
    recorder = TapeRecorder()
    outputs = []
    for runner in (make_runner(path, None), make_runner(path, torch.float32, recorder=recorder)):
        scheduler = MiniScheduler(runner, seed=1)
        first = add_requests(scheduler, GREEDY, SAMPLED, SAMPLED, lens=(4, 6, 8))
        scheduler.step()
        scheduler.step()
        later = add_requests(scheduler, SAMPLED, lens=(5,))
        scheduler.run()
        outputs.append([request.output for request in first + later])
    assert outputs[0] == outputs[1]
    assert len(recorder.tapes) == 3
    assert recorder.num_replays >= 5


@only_triton
def test_a_row_with_a_rarer_parameter_is_not_in_a_recording(tmp_path: Path) -> None:
    recorder = TapeRecorder()
    runner = make_runner(save_tiny("llama", tmp_path, **TINY["llama"]), torch.float32, recorder=recorder)
    scheduler = MiniScheduler(runner)
    add_requests(scheduler, GREEDY, lens=(2,), logprobs=0)
    scheduler.run()
    assert not recorder.tapes


@only_triton
@pytest.mark.parametrize("is_kept", [False, True])
def test_a_tape_shows_a_tensor_that_is_in_no_buffer(is_kept: bool) -> None:
    """One that is gone is an error, one that stays has the numbers of the recorded step: neither is the right sum."""
    kept: list[Tensor] = []

    def step(graphs: DecodeGraphs, number: int) -> Tensor:
        fresh = torch.full((2,), float(number))
        kept.extend([fresh] * is_kept)
        arrays: list[Array] = [fresh.numpy().copy()]

        def work(inputs: tuple[Tensor, ...]) -> Tensor:
            return inputs[0] + fresh

        return graphs.run(2, arrays, work)[0]

    graphs = DecodeGraphs(TapeRecorder(), 4, CPU)
    if not is_kept:
        assert step(graphs, 1).tolist() == [2.0, 2.0]
        with pytest.raises(AssertionError, match="a tensor that is gone"):
            step(graphs, 2)
        return
    assert step(graphs, 1).tolist() == [2.0, 2.0]
    assert step(graphs, 2).tolist() == [3.0, 3.0]  # and not 4: what is not in the buffer stays what it was


@only_triton
def test_a_tape_replays_what_is_in_the_buffer() -> None:
    graphs = DecodeGraphs(TapeRecorder(), 4, CPU)
    weight = torch.tensor([10.0, 20.0])

    def work(inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0] * weight

    for number in (1.0, 2.0, 3.0):
        found, _ = graphs.run(2, [torch.full((2,), number).numpy()], work)
        assert found.tolist() == [10.0 * number, 20.0 * number]
