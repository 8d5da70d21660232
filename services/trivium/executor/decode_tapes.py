"""Decode steps of few rows on a CPU, recorded: naming the operators of one takes the host as long as some of them run.

As `decode_graphs` for a GPU, but the numbers of a step stay where the host writes them, no step is filled up with rows
of no request, and what is recorded is the decoder alone.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trivium.executor.decode_graphs import GraphRecorder, Recording
from trivium.executor.input_batch import BatchLimits
from trivium.executor.models.model import LanguageModel
from trivium.executor.platform import Platform
from trivium.executor.transfers import Array

logger = logging.getLogger(__name__)

MAX_ROWS = 64  # in larger steps the host's time is lost among the products
# Recording takes as long as some ten steps save: a number of rows that comes up less often is not worth it.
STEPS_BEFORE = 8

Work = Callable[[tuple[Tensor, ...]], Tensor]


@dataclass(slots=True)
class _Recorded:
    """buffers: what the recording reads; tensors: the same memory. is_proven: see `DecodeTapes`."""

    buffers: tuple[Array, ...]
    tensors: tuple[Tensor, ...]
    recording: Recording | None = None
    is_proven: bool = False


class DecodeTapes:
    """The recordings of one model, by number of rows. Owner: ForwardPasses.

    A recording is believed once it has given what the operators give, bit by bit, for other numbers than it was made
    with. One that does not is the last: everything is run operator by operator then.

    widths: of the arrays of a step that have two dimensions, their second one at most.
    """

    def __init__(self, recorder: GraphRecorder, widths: Sequence[int]) -> None:
        self._recorder = recorder
        self._widths = tuple(widths)
        self._num_steps: Counter[int] = Counter()  # by number of rows
        self._recorded: dict[int, _Recorded] = {}
        self._is_off = False

    @property
    def num_proven(self) -> int:
        return sum(recorded.is_proven for recorded in self._recorded.values())

    def takes(self, num_rows: int) -> bool:
        """Whether a step of so many rows, which is counted, is to be run by `run`."""
        if self._is_off or num_rows > MAX_ROWS:
            return False
        self._num_steps[num_rows] += 1
        return self._num_steps[num_rows] > STEPS_BEFORE

    def run(self, arrays: Sequence[Array], work: Work) -> Tensor:
        """What `work` makes of tensors with the numbers of `arrays`; the next run of as many rows overwrites it.

        The tensors may have more columns than the arrays, with numbers that some earlier step had there, or 0.
        """
        num_rows = len(arrays[0])
        recorded = self._recorded.get(num_rows)
        if recorded is None:
            recorded = self._recorded[num_rows] = self._make(arrays)
        for buffer, array in zip(recorded.buffers, arrays, strict=True):
            buffer[tuple(slice(0, length) for length in array.shape)] = array
        if recorded.recording is None:
            return self._record(recorded, work)
        return recorded.recording.replay() if recorded.is_proven else self._prove(recorded, recorded.recording, work)

    def _make(self, arrays: Sequence[Array]) -> _Recorded:
        widths = iter(self._widths)
        shapes = [array.shape if array.ndim == 1 else (len(array), next(widths)) for array in arrays]
        buffers = tuple(np.zeros(shape, array.dtype) for shape, array in zip(shapes, arrays, strict=True))
        return _Recorded(buffers, tuple(torch.from_numpy(buffer) for buffer in buffers))

    def _record(self, recorded: _Recorded, work: Work) -> Tensor:
        begin = time.perf_counter()
        try:
            recorded.recording = self._recorder.record(lambda: work(recorded.tensors))
        except Exception as error:  # whatever a recorder does not understand; if it is the step's own, it comes again
            self._turn_off(f"recording failed: {error}")
            return work(recorded.tensors)
        num_rows, seconds = len(recorded.buffers[0]), time.perf_counter() - begin
        logger.info("decode steps of %d rows recorded in %.0f ms", num_rows, 1e3 * seconds)
        return recorded.recording.replay()

    def _prove(self, recorded: _Recorded, recording: Recording, work: Work) -> Tensor:
        found = recording.replay().clone()
        expected = work(recorded.tensors)
        recorded.is_proven = torch.equal(found, expected)
        if not recorded.is_proven:
            self._turn_off("a recording gives other numbers than its operators")
        return expected

    def _turn_off(self, reason: str) -> None:
        self._is_off = True
        self._recorded.clear()
        logger.warning("decode steps are run operator by operator: %s", reason)


def make_tapes(platform: Platform, model: LanguageModel, limits: BatchLimits) -> DecodeTapes | None:
    """For a model on a CPU whose steps are the same operators whatever their rows are."""
    if platform.recorder is None or platform.is_gpu or not model.can_be_recorded:
        return None
    lens = (limits.max_model_len, *([limits.max_encoder_len] if limits.max_encoder_len else []))
    return DecodeTapes(platform.recorder, [-(-length // limits.block_size) for length in lens])
