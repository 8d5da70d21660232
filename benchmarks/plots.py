"""Pictures of a run, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from goals import GOALS
from harness import Timings
from matplotlib import pyplot
from matplotlib.axes import Axes

_DPI = 110


def plot_decode(steps: Mapping[int, Timings], title: str, path: Path) -> None:
    """Bars per batch size (the key of `steps`): milliseconds of the median step, a whisker down to the shortest."""
    _, axes = pyplot.subplots(figsize=(7, 4))
    names = list(dict.fromkeys(name for timings in steps.values() for name in timings))
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        measured = [(place, timings[name]) for place, timings in enumerate(steps.values()) if name in timings]
        axes.bar(
            [place + index * width for place, _ in measured],
            [1e3 * timing.median for _, timing in measured],
            width,
            yerr=([1e3 * (timing.median - timing.minimum) for _, timing in measured], [0.0] * len(measured)),
            label=name,
        )
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(steps))], [f"{batch} requests" for batch in steps])
    axes.set_yscale("log")
    axes.set_ylabel("ms, median")
    axes.set_title(title)
    axes.legend(fontsize=7)
    _save(path)


def plot_latencies(latencies: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """The share of requests that had their last token after so many seconds."""
    _, axes = pyplot.subplots(figsize=(7, 4))
    for name, values in latencies.items():
        ordered = sorted(values)
        axes.step(ordered, [(index + 1) / len(ordered) for index in range(len(ordered))], where="post", label=name)
    axes.set_xlabel("seconds from arrival to the last token")
    axes.set_ylabel("share of requests")
    axes.set_title(title)
    axes.legend(fontsize=7)
    _save(path)


def plot_goals(results: Mapping[str, Timings], path: Path) -> None:
    """How far each measured goal is reached: 1 is the goal, more is better."""
    reached = []
    for goal in GOALS:
        measured = goal.measure(results)
        if measured is not None:
            name, ratio = measured
            share = ratio.medians / goal.bound
            label = f"{goal.work} / {name} ({goal.words})" if name else f"{goal.work} ({goal.words})"
            reached.append((label, share if goal.kind == "slower peer" else 1 / share))
    if not reached:
        return
    _, axes = pyplot.subplots(figsize=(9, 1 + 0.28 * len(reached)))
    labels, shares = zip(*reversed(reached), strict=True)
    places = range(len(labels))  # not the labels themselves: two goals can have the same fastest peer
    axes.barh(places, shares, color=["tab:green" if share >= 1 else "tab:red" for share in shares])
    axes.set_yticks(places, labels)
    _mark_goal(axes)
    _save(path)


def _mark_goal(axes: Axes) -> None:
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("reached, of the goal")
    axes.tick_params(axis="y", labelsize=7)


def _save(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    pyplot.savefig(path, dpi=_DPI, bbox_inches="tight")
    pyplot.close()
