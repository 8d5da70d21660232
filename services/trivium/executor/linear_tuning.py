"""Choosing how each Linear of a loaded model multiplies, by trying what there is on the shapes of the model.

A trial reads its weight from memory, as a step does: between two trials the caches are filled with something else. It
counts the CPU time of its thread, so other processes on the core disturb it little. One log line says what was chosen.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trivium.executor.linear import Linear
from trivium.executor.products import (
    HALF,
    INT8,
    NATIVE,
    NATIVE_BF16,
    NATIVE_BF16_PRODUCTS,
    NATIVE_FP16,
    NATIVE_INT8,
    ONEDNN,
    PLAIN,
    Packing,
    why_unavailable,
)
from trivium.executor.threads import one_thread

logger = logging.getLogger(__name__)

_TRIED_ROWS = (1, 8, 48)
_REPEATS = 3
_MAX_TRIAL_ELEMENTS = 2**19  # of a larger weight, its first rows stand for all
_MIN_TRIED_ELEMENTS = 2**23  # a smaller model lies in the caches, and its start is dearer than its steps: no trials
_CACHE_BYTES = 48 * 2**20
# What a time of 16-bit weights counts: they take half the memory and bandwidth, of which a trial in one thread has more
# than steps in several do. Without it, kernels that are equally fast would be chosen layer by layer, by noise.
_HALF_WEIGHTS_SHARE = 0.8

_HALVES = (NATIVE_BF16, NATIVE_FP16)

Shape = tuple[int, int]


def tune(linears: Sequence[Linear], *, allow_half: bool, quantization: str | None, in_bfloat16: bool = False) -> None:
    """Pack the weights of `linears`. allow_half: the checkpoint stores 16-bit floats, and they may stay so.

    in_bfloat16: weights and activations are rounded to it, where the processor multiplies such numbers. With
    quantization "int8" every layer multiplies in int8 instead.
    """
    begin = time.perf_counter()
    packings = _packings(allow_half=allow_half, quantization=quantization, in_bfloat16=in_bfloat16)
    shapes = {linear.shape for linear in linears}
    is_small = sum(linear.shape[0] * linear.shape[1] for linear in linears) < _MIN_TRIED_ELEMENTS
    ranking = dict.fromkeys(shapes, tuple(packings)) if len(packings) == 1 or is_small else rank(shapes, packings)
    chosen_at = time.perf_counter()
    used: Counter[str] = Counter()
    for linear in linears:
        weight = linear.dense_weight()
        packing = next(packing for packing in ranking[linear.shape] if packing.fits(weight))  # float32 fits every one
        linear.use(packing.pack(weight, linear.bias))
        used[packing.name] += 1
    logger.info(
        "linear layers: %s; chosen in %.2f s, packed in %.2f s",
        ", ".join(f"{count} {name}" for name, count in used.most_common()),
        chosen_at - begin,
        time.perf_counter() - chosen_at,
    )


def rank(shapes: Iterable[Shape], packings: Sequence[Packing]) -> dict[Shape, tuple[Packing, ...]]:
    """For each shape the packings, the fastest over all trials first."""
    trials = [_Trial(shape, packing) for shape in sorted(shapes) for packing in packings]
    with one_thread():  # then CPU time is what a product takes, however the threads of each kind wait
        for num_rows in _TRIED_ROWS:
            _run(trials, num_rows)
    ranking = {}
    for shape in {trial.shape for trial in trials}:
        of_shape = [trial for trial in trials if trial.shape == shape]
        ranking[shape] = tuple(trial.packing for trial in sorted(of_shape, key=lambda trial: trial.share(of_shape)))
    return ranking


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

    def share(self, others: Sequence[_Trial]) -> float:
        """Time over all numbers of rows, each in relation to the fastest of `others`."""
        sums = sum(seconds / min(other.seconds[rows] for other in others) for rows, seconds in self.seconds.items())
        return sums * _HALF_WEIGHTS_SHARE if self.packing in _HALVES else sums


def _run(trials: Sequence[_Trial], num_rows: int) -> None:
    other_data = torch.zeros(_CACHE_BYTES // 4)
    inputs = {trial.shape[1]: torch.full((num_rows, trial.shape[1]), 0.5) for trial in trials}
    for repeat in range(_REPEATS + 1):
        for index, trial in enumerate(trials):
            if repeat and index % 4 == 0:
                other_data.add_(1.0)
            trial.run(inputs[trial.shape[1]])


def _packings(*, allow_half: bool, quantization: str | None, in_bfloat16: bool) -> list[Packing]:
    """What there is, an exact one first: our own, or where they cannot be had, torch's.

    They are not mixed, because a row has the same result beside any other rows only with ours.
    """
    if quantization == "int8":
        return _available([NATIVE_INT8]) or _available([INT8]) or [PLAIN]
    if in_bfloat16 and (products := _available([NATIVE_BF16_PRODUCTS])):
        return products
    ours = _available([NATIVE, *((NATIVE_BF16, NATIVE_FP16) if allow_half else ())])
    return ours if NATIVE in ours else [*_available([ONEDNN, *((HALF,) if allow_half else ())]), PLAIN]


def _available(wanted: Sequence[Packing]) -> list[Packing]:
    """Those of `wanted` that work here, with a log line for each that does not."""
    found = []
    for packing in wanted:
        reason = why_unavailable(packing)
        if reason is None:
            found.append(packing)
        else:
            logger.warning("matrix products: no %s on this machine: %s", packing.name, reason)
    return found
