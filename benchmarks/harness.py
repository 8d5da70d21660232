"""Measuring peers in turns, and writing what came out: ratios of medians with minimum and spread, never a time alone.

On a shared machine times drift by half and more; what alternates within one run drifts together.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from peers import Answer, Peer, PeerError, Prompts

RESULTS = Path(__file__).parent / "results"
FEW = 4
UNIT_FACTORS = {"ms": 1e3, "s": 1.0}


class Runner(Protocol):
    """What can be measured: a process of its own (`peers.Peer`), or something in this one."""

    name: str

    @property
    def is_alive(self) -> bool: ...


class Generator(Runner, Protocol):
    def generate(self, prompts: Prompts, num_tokens: int, *, num_beams: int = 1) -> Answer: ...


SomeRunner = TypeVar("SomeRunner", bound=Runner)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of every run, and the CPU seconds that all threads of the peer's processes took."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...] = ()

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float | None:
        return statistics.median(self.cpu_seconds) if self.cpu_seconds else None


Timings = Mapping[str, Timing]  # by the name of the peer


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long one side takes. low and high: of single runs, next to each other in time if both have
    as many.
    """

    medians: float
    shortest: float
    low: float
    high: float
    cpu: float | None

    @classmethod
    def of(cls, longer: Timing, base: Timing) -> Ratio:
        single = [one / other for one, other in _pairs(longer.seconds, base.seconds)]
        has_cpu = longer.cpu_median is not None and base.cpu_median
        return cls(
            longer.median / base.median,
            longer.minimum / base.minimum,
            min(single),
            max(single),
            (longer.cpu_median or 0) / (base.cpu_median or 1) if has_cpu else None,
        )

    def cells(self) -> list[str]:
        return [f"**{self.medians:.2f}**", f"{self.shortest:.2f}", self.spread, f"{self.cpu:.2f}" if self.cpu else ""]

    @property
    def spread(self) -> str:
        return f"{self.low:.2f} to {self.high:.2f}"


def _pairs(first: Sequence[float], second: Sequence[float]) -> Iterable[tuple[float, float]]:
    return zip(first, second, strict=True) if len(first) == len(second) else itertools.product(first, second)


RATIO_HEADER = ("medians", "shortest", "single runs", "CPU time")


@dataclass(frozen=True, slots=True)
class Effort:
    """At most `runs`, and after the first `at_least` none that would end after `budget_s` seconds."""

    runs: int
    budget_s: float = math.inf
    at_least: int = 1


@dataclass(frozen=True, slots=True)
class Steps:
    """A short and a long generation, of FEW and `many` tokens: what the long one takes more, its further steps take."""

    many: int
    num_beams: int = 1


def alternate(
    peers: Sequence[SomeRunner], work: Callable[[SomeRunner, int], Answer], effort: Effort
) -> dict[str, Timing]:
    """Seconds of `work` for a peer in the run of a number; every peer once per run, in a new order each time.

    A peer that fails is left out. Whatever has to warm up has to be warm before.
    """
    order = random.Random(0)
    answers: dict[str, list[Answer]] = {}
    begin = time.perf_counter()
    for run in range(effort.runs):
        elapsed = time.perf_counter() - begin
        if run >= effort.at_least and elapsed * (run + 1) / run > effort.budget_s:
            break
        for peer in order.sample(peers, len(peers)):
            if peer.is_alive:
                try:
                    answers.setdefault(peer.name, []).append(work(peer, run))
                except PeerError as error:
                    progress(f"left out: {error}")
    return {
        peer.name: Timing(
            tuple(answer.seconds for answer in answers[peer.name]),
            tuple(answer.cpu_seconds for answer in answers[peer.name]),
        )
        for peer in peers
        if peer.is_alive and peer.name in answers
    }


SomeGenerator = TypeVar("SomeGenerator", bound=Generator)


def decode_steps(
    peers: Sequence[SomeGenerator], make_prompts: Callable[[int], Prompts], steps: Steps, effort: Effort
) -> dict[str, Timing]:
    """Seconds per decode step: what each long generation takes more than the shortest of the short ones.

    The difference to the short one beside it would be the step of that moment, but a busy machine can make it negative.
    make_prompts: from a seed; no prompts are used twice, so prefix caches gain nothing.
    """
    shorts: dict[str, list[Answer]] = {}

    def work(peer: SomeGenerator, run: int) -> Answer:
        short = peer.generate(make_prompts(2 * run), FEW, num_beams=steps.num_beams)
        shorts.setdefault(peer.name, []).append(short)
        return peer.generate(make_prompts(2 * run + 1), steps.many, num_beams=steps.num_beams)

    warm = make_prompts(-1)
    alternate(peers, lambda peer, _: peer.generate(warm, FEW, num_beams=steps.num_beams), Effort(1))
    longs = alternate(peers, work, effort)
    return {name: _per_step(long, shorts[name], steps.many - FEW) for name, long in longs.items()}


def _per_step(long: Timing, shorts: Sequence[Answer], num_steps: int) -> Timing:
    seconds = min(short.seconds for short in shorts)
    cpu_seconds = min(short.cpu_seconds for short in shorts)
    return Timing(
        tuple((one - seconds) / num_steps for one in long.seconds),
        tuple((one - cpu_seconds) / num_steps for one in long.cpu_seconds),
    )


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Other ones for another seed, count or length: not even their beginnings are the same."""
    numbers = random.Random(f"{count} {length} {seed}")
    return [[numbers.randrange(4, vocab_size) for _ in range(length)] for _ in range(count)]


def compare(timings: Timings, ours: str, unit: str = "ms", missing: Mapping[str, str] | None = None) -> str:
    """A table; a ratio above 1 says that a peer takes longer than `ours`. missing: reasons, by the name of the peer."""
    factor = UNIT_FACTORS[unit]
    header = ("", f"median, {unit}", "shortest", "runs", f"medians / {ours}", *RATIO_HEADER[1:])
    rows = [
        [
            name,
            f"{factor * timing.median:.2f}",
            f"{factor * timing.minimum:.2f}",
            str(len(timing.seconds)),
            *(Ratio.of(timing, timings[ours]).cells() if ours in timings else [""] * 4),
        ]
        for name, timing in timings.items()
    ]
    return table(header, rows + missing_rows(missing or {}, len(header)))


def missing_rows(missing: Mapping[str, str], num_columns: int) -> list[list[str]]:
    return [[name, f"- ({_one_line(reason)})", *[""] * (num_columns - 2)] for name, reason in missing.items()]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def environment(num_threads: int) -> str:
    """One line: what the numbers were measured on."""
    processor = next(
        (line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.machine()
    )
    return (
        f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f} at the start; {num_threads} threads; "
        f"Python {platform.python_version()}, torch {version('torch')}; {time.strftime('%Y-%m-%d')}"
    )


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def progress(text: str) -> None:
    """A line on stderr for whoever waits."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Report:
    """Prints as it grows; `save` writes it to results/. results: every timing of the run, by what was measured."""

    def __init__(self, title: str, num_threads: int) -> None:
        self.results: dict[str, Timings] = {}
        self._begin = time.perf_counter()
        self._parts: list[str] = []
        self.add(f"# {title}\n\n{environment(num_threads)}\n")

    def add(self, text: str) -> None:
        print(text, flush=True)
        self._parts.append(text)

    def record(
        self,
        key: str,
        timings: Timings,
        *,
        title: str,
        ours: str,
        unit: str = "ms",
        missing: Mapping[str, str] | None = None,
    ) -> None:
        """A section with a table."""
        self.results[key] = timings
        self.add(f"## {title}\n\n{compare(timings, ours, unit, missing)}")

    def describe(self, peers: Iterable[Peer], missing: Mapping[str, str]) -> None:
        """What the peers are: versions and code paths."""
        header = ("", "version", "code path", "loaded in, s")
        rows = [[peer.name, peer.facts["version"], peer.facts["path"], f"{peer.start_seconds:.1f}"] for peer in peers]
        self.add(table(header, rows + missing_rows(missing, len(header))))

    def save(self, name: str) -> Path:
        self.add(f"Measured in {time.perf_counter() - self._begin:.0f} s.\n")
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.md"
        path.write_text("\n".join(self._parts))
        return path
