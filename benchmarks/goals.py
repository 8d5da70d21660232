"""What this project wants to reach against its peers, and whether a run has shown it.

A goal reads one entry of `Report.results`. Against several peers, the fastest counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness import Ratio, Timing, Timings, table
from roster import BFLOAT16, CONTINUOUS, CT2, CT2_HALF, CT2_INT8, EXACT, HALF, HF, INT8, VLLM

LIMIT = "the machine's limit"
SERVE = "trivium serve"

# "slower peer": the peers take at least `bound` times as long; "faster": we take at most `bound` times what they do;
# "seconds": we take at most `bound` seconds.
Kind = Literal["slower peer", "faster", "seconds"]


@dataclass(frozen=True, slots=True)
class Goal:
    """key: of `Report.results`. peers: the fastest of those measured counts, and without any there is no result."""

    work: str
    key: str
    ours: str
    peers: tuple[str, ...]
    bound: float
    kind: Kind = "slower peer"

    @property
    def words(self) -> str:
        if self.kind == "slower peer":
            return f"at least {self.bound:g}x"
        return f"at most {self.bound:g}" + (" s" if self.kind == "seconds" else "x")

    def measure(self, results: Mapping[str, Timings]) -> tuple[str, Ratio] | None:
        """The peer that counts, and the ratio that `bound` is about (for seconds: the seconds)."""
        timings = results.get(self.key, {})
        ours = timings.get(self.ours)
        if ours is None:
            return None
        if self.kind == "seconds":
            seconds = ours.seconds
            return "", Ratio(ours.median, ours.minimum, min(seconds), max(seconds), None)
        name = min((peer for peer in self.peers if peer in timings), key=lambda peer: timings[peer].median, default="")
        if not name:
            return None
        return name, Ratio.of(*_order(self.kind, ours, timings[name]))

    def verdict(self, ratio: Ratio) -> str:
        missed_by = 1 - ratio.medians / self.bound if self.kind == "slower peer" else ratio.medians / self.bound - 1
        return "met" if missed_by <= 0 else f"missed by {missed_by:.0%}"


def _order(kind: Kind, ours: Timing, peer: Timing) -> tuple[Timing, Timing]:
    return (peer, ours) if kind == "slower peer" else (ours, peer)


def _decode(kind: str, ours: str, against: tuple[str, ...], bounds: Sequence[float], setting: str = "") -> list[Goal]:
    return [
        Goal(f"decode, {kind}{setting}, batch {batch}", decode_key(kind, batch), ours, against, bound)
        for batch, bound in zip((1, 8, 32), bounds, strict=True)
    ]


def decode_key(kind: str, batch: int) -> str:
    """kind: float32, 16-bit or int8, of the decode steps of the Llama of 135M parameters."""
    return f"decode {kind} {batch}"


def limit_key(kind: str, batch: int) -> str:
    return f"limit {kind} {batch}"


PREFILL, PREFIX, ARRIVALS, START = "prefill", "prefix", "arrivals", "start"
TRANSLATION, TRANSLATION_P99 = "translation", "translation p99"

GOALS = (
    *_decode("float32", EXACT, (HF,), (3, 2.8, 2.2)),
    *_decode("float32", EXACT, (CT2,), (1.2, 1.5, 1.8)),
    *_decode("float32", EXACT, (VLLM,), (2.5, 2.2, 2.2)),
    *_decode("16-bit", HALF, (CT2, CT2_HALF), (1.5, 1.8, 1.9)),
    *_decode("16-bit", HALF, (CT2, CT2_HALF, CT2_INT8), (1.5, 1.8, 1.9)),
    *_decode("16-bit", BFLOAT16, (CT2, CT2_HALF, CT2_INT8), (1.5, 1.8, 1.9), " with --dtype bfloat16"),
    *_decode("int8", INT8, (CT2_INT8,), (2, 2, 2)),
    Goal("prefill, 8 prompts of 512 tokens", PREFILL, EXACT, (HF, CT2, VLLM), 1.2),
    Goal("mixed arrivals, Qwen3-0.6B, throughput", ARRIVALS, HALF, (CONTINUOUS,), 2.5),
    Goal("mixed arrivals, Qwen3-0.6B, throughput, static batches of 16", ARRIVALS, HALF, (HF, CT2), 2.5),
    Goal("translation, beam 4, at once", TRANSLATION, EXACT, (HF,), 3),
    Goal("translation, beam 4, at once", TRANSLATION, EXACT, (CT2,), 1),
    Goal("translation, beam 4, arriving, p99 latency", TRANSLATION_P99, EXACT, (CT2,), 0.6, "faster"),
    Goal("start to first token", START, SERVE, (), 8, "seconds"),
    *(
        Goal(f"decode step, {kind}, batch {batch}", limit_key(kind, batch), ours, (LIMIT,), bound, "faster")
        for kind, ours in (("float32", EXACT), ("16-bit", HALF))
        for batch, bound in ((1, 1.5), (32, 2))
    ),
)


def goals_table(results: Mapping[str, Timings]) -> str:
    """Every goal; one that this run has not measured says so."""
    rows = []
    for goal in GOALS:
        measured = goal.measure(results)
        if measured is None:
            rows.append([goal.work, ", ".join(goal.peers), goal.words, *[""] * 4, "not measured in this run"])
            continue
        name, ratio = measured
        rows.append([goal.work, name, goal.words, *ratio.cells(), goal.verdict(ratio)])
    return table(("work", "against", "goal", "medians", "shortest", "single runs", "CPU time", "result"), rows)
