"""Decode steps as recorded graphs: a GPU runs hundreds of small kernels faster than a host can name them.

A graph reads and writes the addresses that it was recorded with. So a step of so many rows has a buffer of its own for
all that changes from step to step, and is filled up with rows that write nowhere to the next size there is a buffer
for. A size is recorded when it is first needed, which takes a moment; all recordings share their working memory,
because they run one after the other.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trivium.executor.transfers import Array, Layout, refill

logger = logging.getLogger(__name__)

# Rows that no step is filled up to for nothing: powers of two first, later a share of 1/32 and less is wasted.
SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))

Work = Callable[[tuple[Tensor, ...]], Tensor]


class Recording(Protocol):
    def replay(self) -> Tensor:
        """Do again what was recorded. What it returns is overwritten by the next replay."""
        ...


class GraphRecorder(Protocol):
    """Records what runs on a device."""

    def record(self, work: Callable[[], Tensor]) -> Recording:
        """`work` may run more than once; it allocates by shapes alone, and waits for nothing.

        Whatever it reads that was not made by itself must stay where it is: weights, pools, buffers.
        """
        ...


@dataclass(frozen=True, slots=True)
class CudaRecording:
    graph: Any
    output: Tensor

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output


class CudaGraphRecorder:
    """CUDA graphs with one pool of memory (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, work: Callable[[], Tensor]) -> Recording:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # kernels are compiled and libraries take their workspaces, neither of which can be recorded
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Grammars are compiled in other threads meanwhile, which is none of this thread's business.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            output = work()
        return CudaRecording(graph, output)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """buffer: bytes on the device. views: the arrays in it, which the recording reads."""

    buffer: Tensor
    views: tuple[Tensor, ...]
    recording: Recording


class DecodeGraphs:
    """The recordings of one model, by number of rows. Owner: DeferredSteps.

    sizes: those of `SIZES` up to `max_rows`, which is one itself.
    """

    def __init__(self, recorder: GraphRecorder, max_rows: int, device: torch.device) -> None:
        most = min(max_rows, SIZES[-1])
        self.sizes = (*SIZES[: bisect_left(SIZES, most)], most)
        self._recorder = recorder
        self._device = device
        self._recorded: dict[int, _Recorded] = {}  # number of rows -> recording

    def __len__(self) -> int:
        return len(self._recorded)

    def size_for(self, num_rows: int) -> int | None:
        """The number of rows of the recording that `num_rows` rows run in; None if they are too many for any."""
        place = bisect_left(self.sizes, num_rows)
        return self.sizes[place] if place < len(self.sizes) else None

    def run(self, size: int, arrays: Sequence[Array], work: Work) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(what `work` makes of the arrays, the arrays on the device). arrays: of `size` rows, always the same shapes.

        Both are overwritten by the next run of this size.
        """
        recorded = self._recorded.get(size)
        if recorded is None:
            recorded = self._recorded[size] = self._record(size, arrays, work)
        else:
            refill(arrays, recorded.buffer)
        return recorded.recording.replay(), recorded.views

    def _record(self, size: int, arrays: Sequence[Array], work: Work) -> _Recorded:
        begin = time.perf_counter()
        layout = Layout(arrays)
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self._device)
        refill(arrays, buffer)
        views = layout.views(buffer)
        recorded = _Recorded(buffer, views, self._recorder.record(lambda: work(views)))
        logger.info("decode steps of %d rows recorded in %.2f s", size, time.perf_counter() - begin)
        return recorded
