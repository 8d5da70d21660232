"""Which steps are recorded, and in what order a CUDA graph is made; torch's own part of it is replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trivium.config import ExecutorConfig
from trivium.executor import platform
from trivium.executor.decode_graphs import SIZES, CudaGraphRecorder, DecodeGraphs
from trivium.executor.model_config import JsonConfig
from trivium.executor.platform import choose_platform
from trivium_kernels.dispatch import torch_kernels

CPU = torch.device("cpu")


class Recorder:
    """Runs what it was given again, whatever that is."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def record(self, work: Callable[[], Tensor]) -> SimpleNamespace:
        self.num_recorded += 1
        return SimpleNamespace(replay=work)


def test_sizes_reach_to_the_most_rows_there_can_be() -> None:
    assert DecodeGraphs(Recorder(), 64, CPU).sizes == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert DecodeGraphs(Recorder(), 5, CPU).sizes == (1, 2, 4, 5)
    assert DecodeGraphs(Recorder(), 1, CPU).sizes == (1,)
    assert DecodeGraphs(Recorder(), 10_000, CPU).sizes == SIZES


@pytest.mark.parametrize(("num_rows", "size"), [(1, 1), (3, 4), (4, 4), (9, 16), (64, 64), (65, None)])
def test_a_step_takes_the_next_size(num_rows: int, size: int | None) -> None:
    assert DecodeGraphs(Recorder(), 64, CPU).size_for(num_rows) == size


def test_every_size_is_recorded_once_when_it_is_needed() -> None:
    recorder = Recorder()
    graphs = DecodeGraphs(recorder, 8, CPU)
    assert len(graphs) == 0
    for size in (2, 4, 2, 4, 2):
        found, (views,) = graphs.run(size, [np.arange(size)], lambda inputs: inputs[0] + 1)
        assert found.tolist() == list(range(1, size + 1))
        assert views.tolist() == list(range(size))
    assert (len(graphs), recorder.num_recorded) == (2, 2)


class Cuda:
    """What torch.cuda is asked for, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.pools: list[object] = []
        handles = iter(("pool 1", "pool 2"))
        stream = SimpleNamespace(wait_stream=lambda other: self.events.append("wait"))
        for name, value in {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda _: self._named("side stream"),
            "graph_pool_handle": lambda: next(handles),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.events.append("replay")),
            "graph": self._graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def _graph(self, graph: object, *, pool: object, stream: object, capture_error_mode: str) -> Any:
        self.pools.append(pool)
        return self._named("capture")

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        self.events.append(f"{name} begins")
        yield
        self.events.append(f"{name} ends")


def test_work_runs_once_before_it_is_captured_and_all_graphs_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, recorder = Cuda(monkeypatch), CudaGraphRecorder()
    output = torch.zeros(1)

    def work() -> Tensor:
        cuda.events.append("work")
        return output

    recording = recorder.record(work)
    assert cuda.events == [
        "wait", "side stream begins", "work", "side stream ends", "wait", "capture begins", "work", "capture ends"
    ]  # fmt: skip
    recorder.record(work)
    assert cuda.pools == ["pool 1", "pool 1"]
    cuda.events.clear()
    assert recording.replay() is output
    assert cuda.events == ["replay"]


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_enforce_eager_records_nothing(enforce_eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(platform, "select_kernels", lambda device: torch_kernels())
    config = ExecutorConfig(model="m", served_model_name="m", enforce_eager=enforce_eager)
    chosen = choose_platform(config, JsonConfig({"torch_dtype": "bfloat16"}), 0)
    assert (chosen.recorder is None) == enforce_eager
    assert (chosen.device, chosen.dtype, chosen.is_gpu) == (torch.device("cuda", 0), torch.bfloat16, True)


@pytest.mark.parametrize(
    ("dtype", "own", "expected"),
    [
        ("auto", "float16", torch.float16),
        ("auto", None, torch.float32),
        ("bfloat16", "float16", torch.bfloat16),
        ("float", "bfloat16", torch.float32),
    ],
)
def test_a_gpu_takes_the_type_of_the_checkpoint_or_what_it_is_told(
    dtype: str, own: str | None, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(platform, "select_kernels", lambda device: torch_kernels())
    config = ExecutorConfig(model="m", served_model_name="m", dtype=dtype)
    assert choose_platform(config, JsonConfig({"dtype": own}), 0).dtype is expected
