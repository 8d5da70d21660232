"""Choosing how each Linear of a loaded model multiplies, by trying what there is on the shapes of the model.

A trial reads its weight from memory, as a step does: between two trials the caches are filled with something else. It
counts the CPU time of its thread, so other processes on the core disturb it little. One log line says what was chosen.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivium.executor.linear import Linear
from trivium.executor.products import (
    HALF,
    INT8,
    NATIVE,
    NATIVE_BF16,
    NATIVE_FP16,
    NATIVE_INT8,
    ONEDNN,
    PLAIN,
    Packing,
    why_unavailable,
)
from trivium.executor.threads import one_thread

logger = logging.getLogger(__name__)

MAX_SMALL_ROWS = 32  # calls with more rows may use another packing
_SMALL_TRIALS, _LARGE_TRIALS = (1, 8), (96,)  # rows of the trials
_REPEATS = 3
_MAX_TRIAL_ELEMENTS = 2**19  # of a larger weight, its first rows stand for all
_MIN_ELEMENTS = 2**14  # smaller weights: the call costs more than the product
_MIN_TRIED_ELEMENTS = 2**23  # a smaller model lies in the caches, and its start is dearer than its steps: no trials
_SECOND_PACKING_GAIN = 0.8  # a second copy of a weight must bring large calls to this share of their time
_CACHE_BYTES = 48 * 2**20

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Choice:
    small: Packing
    large: Packing

    def __str__(self) -> str:
        return self.small.name if self.small == self.large else f"{self.small.name}/{self.large.name}"


def tune(linears: Sequence[Linear], *, allow_half: bool, quantization: str | None) -> None:
    """Pack the weights of `linears`. allow_half: the checkpoint stores 16-bit floats, and they may stay so.

    With quantization "int8" every layer multiplies in int8.
    """
    begin = time.perf_counter()
    packings = _packings(allow_half=allow_half, quantization=quantization)
    shapes = {linear.shape for linear in linears if linear.shape[0] * linear.shape[1] >= _MIN_ELEMENTS}
    first = (Choice(packings[0], packings[0]),)
    is_small = sum(linear.shape[0] * linear.shape[1] for linear in linears) < _MIN_TRIED_ELEMENTS
    ranking = dict.fromkeys(shapes, first) if len(packings) == 1 or is_small else choose(shapes, packings)
    small = first if quantization else (Choice(PLAIN, PLAIN),)
    chosen_at = time.perf_counter()
    used: Counter[str] = Counter()
    for linear in linears:
        choice = _first_that_fits(ranking.get(linear.shape, small), linear)
        apply(linear, choice)
        used[str(choice)] += 1
    logger.info(
        "linear layers: %s; chosen in %.2f s, packed in %.2f s",
        ", ".join(f"{count} {name}" for name, count in used.most_common()),
        chosen_at - begin,
        time.perf_counter() - chosen_at,
    )


def apply(linear: Linear, choice: Choice) -> None:
    """Give `linear` the packed weights of `choice`."""
    weight = linear.dense_weight()
    large = choice.large.pack(weight, linear.bias)
    small = large if choice.small == choice.large else choice.small.pack(weight, linear.bias)
    linear.use(small, large, max_small_rows=MAX_SMALL_ROWS)


def choose(shapes: Iterable[Shape], packings: Sequence[Packing]) -> dict[Shape, tuple[Choice, ...]]:
    """For each shape the packings for few rows, the fastest first, each with another for many rows where that pays."""
    trials = [_Trial(shape, packing) for shape in sorted(shapes) for packing in packings]
    for num_rows in (*_SMALL_TRIALS, *_LARGE_TRIALS):
        _run(trials, num_rows)
    ranking = {}
    for shape in {trial.shape for trial in trials}:
        of_shape = [trial for trial in trials if trial.shape == shape]
        large = min(of_shape, key=lambda trial: trial.share(of_shape, _LARGE_TRIALS))
        best = sorted(of_shape, key=lambda trial: trial.share(of_shape, _SMALL_TRIALS))
        ranking[shape] = tuple(_with_large(trial, large) for trial in best)
    return ranking


def _with_large(small: _Trial, large: _Trial) -> Choice:
    rows = _LARGE_TRIALS[0]
    pays = large.seconds[rows] < _SECOND_PACKING_GAIN * small.seconds[rows]
    return Choice(small.packing, large.packing if pays else small.packing)


def _first_that_fits(choices: Sequence[Choice], linear: Linear) -> Choice:
    """There is one: those in float32 fit every weight."""
    weight = linear.dense_weight()
    return next(choice for choice in choices if choice.small.fits(weight) and choice.large.fits(weight))


class _Trial:
    """One packing of one shape: seconds by number of rows, for as much of the weight as the trial has."""

    def __init__(self, shape: Shape, packing: Packing) -> None:
        out_features = max(16, min(shape[0], _MAX_TRIAL_ELEMENTS // shape[1]))
        weight = torch.full((out_features, shape[1]), 0.01)
        self.shape = shape
        self.packing = packing
        self.seconds: dict[int, float] = {}
        self._product = packing.pack(weight, None)

    def run(self, x: Tensor) -> None:
        begin = time.thread_time()
        self._product(x)
        seconds = time.thread_time() - begin
        self.seconds[len(x)] = min(seconds, self.seconds.get(len(x), seconds))

    def share(self, others: Sequence[_Trial], row_counts: Sequence[int]) -> float:
        """Time over these row counts, each in relation to the fastest of `others`."""
        return sum(self.seconds[rows] / min(other.seconds[rows] for other in others) for rows in row_counts)


def _run(trials: Sequence[_Trial], num_rows: int) -> None:
    """On one thread, so that CPU time is what a product takes, however the threads of each kind wait."""
    with one_thread():
        _run_here(trials, num_rows)


def _run_here(trials: Sequence[_Trial], num_rows: int) -> None:
    other_data = torch.zeros(_CACHE_BYTES // 4)
    inputs = {trial.shape[1]: torch.full((num_rows, trial.shape[1]), 0.5) for trial in trials}
    for repeat in range(_REPEATS + 1):
        for index, trial in enumerate(trials):
            if repeat and index % 4 == 0:
                other_data.add_(1.0)
            trial.run(inputs[trial.shape[1]])


def _packings(*, allow_half: bool, quantization: str | None) -> list[Packing]:
    """What there is, an exact one first, with a log line for what there should be."""
    exact = [NATIVE, ONEDNN]
    half = [NATIVE_BF16, NATIVE_FP16, HALF] if allow_half else []
    wanted = [NATIVE_INT8, INT8] if quantization == "int8" else [*exact, *half]
    found = []
    for packing in wanted:
        reason = why_unavailable(packing)
        if reason is None:
            found.append(packing)
        else:
            logger.warning("matrix products: no %s on this machine: %s", packing.name, reason)
    return found if found and quantization else [*found, PLAIN]
