"""Measuring peers in turns, and writing what came out: ratios with minimum and spread, never a single time alone.

On a shared machine times drift by half and more; what alternates within one run drifts together.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from peers import Peer

RESULTS = Path(__file__).parent / "results"

Work = Callable[[Peer], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of every run, and the CPU seconds that all threads of the process took."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """How much longer the median run took than the shortest."""
        return self.median / self.minimum - 1


@dataclass(frozen=True, slots=True)
class Steps:
    """A short and a long generation."""

    few: int = 4
    many: int = 24
    num_beams: int = 1


def alternate(peers: Sequence[Peer], work: Work, runs: int) -> dict[str, Timing]:
    """Name -> seconds of `work`, every peer once per run, in a new order each time. The first round is not counted."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    cpu_seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for run in range(runs + 1):
        for peer in order.sample(peers, len(peers)):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            work(peer)
            if run:
                seconds[peer.name].append(time.perf_counter() - begin)
                cpu_seconds[peer.name].append(time.process_time() - cpu_begin)
    return {name: Timing(tuple(seconds[name]), tuple(cpu_seconds[name])) for name in seconds}


def decode_steps(peers: Sequence[Peer], prompts: Sequence[Sequence[int]], steps: Steps, runs: int) -> dict[str, Timing]:
    """Name -> seconds per decode step: what a long generation takes more than a short one, by their shortest runs.

    The runs of the result are those of the long generation, less the shortest short one.
    """
    short = alternate(peers, lambda peer: peer.generate(prompts, steps.few, steps.num_beams), runs)
    long = alternate(peers, lambda peer: peer.generate(prompts, steps.many, steps.num_beams), runs)
    return {name: _difference(long[name], short[name], steps.many - steps.few) for name in long}


def _difference(long: Timing, short: Timing, num_steps: int) -> Timing:
    return Timing(
        tuple((seconds - short.minimum) / num_steps for seconds in long.seconds),
        tuple((seconds - min(short.cpu_seconds)) / num_steps for seconds in long.cpu_seconds),
    )


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(4, vocab_size) for _ in range(length)] for _ in range(count)]


def compare(timings: Mapping[str, Timing], ours: str) -> list[list[str]]:
    """Rows of a table under COMPARE_HEADER; a ratio above 1 says that the peer takes longer than `ours`.

    With one thread the CPU time says most on a machine that is busy with other things, too.
    """
    base = timings[ours]
    return [
        [
            name,
            f"{1e3 * timing.minimum:.2f}",
            f"{timing.spread:.0%}",
            f"{timing.minimum / base.minimum:.2f}",
            f"{timing.median / base.median:.2f}",
            f"{min(timing.cpu_seconds) / min(base.cpu_seconds):.2f}",
        ]
        for name, timing in timings.items()
    ]


COMPARE_HEADER = ("", "shortest, ms", "spread", "/ trivium (shortest)", "/ trivium (medians)", "/ trivium (CPU time)")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def environment(num_threads: int) -> str:
    """One line: what the numbers were measured on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "ctranslate2"))
    processor = next(
        (line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.machine()
    )
    load = os.getloadavg()[0]
    return (
        f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, load {load:.1f}; "
        f"{num_threads} threads, float32 arithmetic unless said otherwise; "
        f"Python {platform.python_version()}, {packages}"
    )


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


class Report:
    """Prints as it grows; `save` writes it to results/."""

    def __init__(self, title: str, num_threads: int) -> None:
        self._parts: list[str] = []
        self.add(f"# {title}\n\n{environment(num_threads)}\n")

    def add(self, text: str) -> None:
        print(text, flush=True)
        self._parts.append(text)

    def save(self, name: str) -> None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text("\n".join(self._parts))
