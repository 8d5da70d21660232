"""Requests that arrive by a Poisson process, and what became of them.

This project, transformers' continuous batching and vLLM take them as they come. The others get what a simple server
gives them: whatever waits is one static batch (`worker.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from checkpoints import EOS, Shape
from harness import Effort, Timing, Timings, alternate, table
from peers import Answer, Peer

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Arrival:
    """seconds: after the start. num_tokens: of the output; None if it ends by itself."""

    seconds: float
    prompt: list[int]
    num_tokens: int | None


def requests(shape: Shape, count: int, rate: float, seed: int = 0) -> list[Arrival]:
    """`count` requests, `rate` per second: prompts of 8 to 64 tokens, outputs of 4 to 48."""
    numbers = random.Random(f"requests {count} {seed}")
    return [
        Arrival(seconds, _tokens(numbers, shape, numbers.randint(8, 64)), numbers.randint(4, 48))
        for seconds in _times(numbers, count, rate)
    ]


def sentences(shape: Shape, count: int, rate: float, seed: int = 0) -> list[Arrival]:
    """Sources of 4 to 70 tokens, the median 20, EOS included, for a model that copies."""
    numbers = random.Random(f"sentences {count} {seed}")
    lengths = [min(69, max(3, round(numbers.lognormvariate(3.0, 0.5)))) for _ in range(count)]
    return [
        Arrival(seconds, [*_tokens(numbers, shape, length), EOS], None)
        for seconds, length in zip(_times(numbers, count, rate), lengths, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Served:
    """What came of the runs of one comparison.

    makespans: from the first arrival to the last token. latencies: from the arrival of every request to its last token,
    run by run, by the name of the peer.
    """

    makespans: Timings
    latencies: Mapping[str, Sequence[Sequence[float]]]

    def percentiles(self, percent: int) -> dict[str, Timing]:
        return {
            name: Timing(tuple(float(np.percentile(latencies, percent)) for latencies in self.latencies[name]))
            for name in self.makespans
        }

    def table(self) -> str:
        """Medians of the runs."""
        columns = [self.percentiles(percent) for percent in PERCENTILES]
        rows = [
            [name, f"{self._rate(name):.2f}", *(f"{column[name].median:.2f}" for column in columns)]
            for name in self.makespans
        ]
        header = ("", "requests per s", *(f"seconds to the last token, p{percent}" for percent in PERCENTILES))
        return table(header, rows)

    def _rate(self, name: str) -> float:
        return len(self.latencies[name][0]) / self.makespans[name].median


def serve(
    peers: Sequence[Peer],
    make_trace: Callable[[int], Sequence[Arrival]],
    effort: Effort,
    *,
    num_beams: int = 1,
    max_batch: int,
) -> Served:
    """make_trace: from the number of the run, the same for all peers. max_batch: of those that need static batches."""
    latencies: dict[str, list[list[float]]] = {}

    def work(peer: Peer, run: int) -> Answer:
        trace = make_trace(run)
        answer = peer.serve(trace, num_beams=num_beams, max_batch=max_batch)
        waits = [done - arrival.seconds for done, arrival in zip(answer.value, trace, strict=True)]
        latencies.setdefault(peer.name, []).append(waits)
        return Answer(None, max(answer.value) - trace[0].seconds, answer.cpu_seconds)

    return Served(alternate(peers, work, effort), latencies)


def _times(numbers: random.Random, count: int, rate: float) -> list[float]:
    times, now = [], 0.0
    for _ in range(count):
        now += numbers.expovariate(rate)
        times.append(now)
    return times


def _tokens(numbers: random.Random, shape: Shape, count: int) -> list[int]:
    return [numbers.randrange(4, shape.vocab_size) for _ in range(count)]
