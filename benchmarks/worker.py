"""The process of one peer: commands come as JSON lines on stdin, answers go to stdout, whatever it prints to stderr.

It times itself, so pipes cost nothing, and counts the CPU time of its own processes. Runs under the interpreter of the
peer, with nothing but psutil and that peer. The first line says which engine to make.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))

import engines


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print

    def answer(value: object, seconds: float, cpu_seconds: float) -> None:
        print(json.dumps({"value": value, "seconds": seconds, "cpu_seconds": cpu_seconds}), file=answers, flush=True)

    settings = json.loads(sys.stdin.readline())
    begin, cpu_begin = time.perf_counter(), cpu_seconds()
    engine = getattr(engines, settings.pop("engine"))(**settings)
    answer(engine.facts, time.perf_counter() - begin, cpu_seconds() - cpu_begin)
    for line in sys.stdin:
        command = json.loads(line)
        run = {"generate": engine.generate, "serve": lambda **given: serve(engine, **given)}[command.pop("command")]
        begin, cpu_begin = time.perf_counter(), cpu_seconds()
        value = run(**command)
        answer(value, time.perf_counter() - begin, cpu_seconds() - cpu_begin)


def serve(engine: Any, trace: Sequence[engines.Arrival], num_beams: int, max_batch: int) -> list[float]:
    """Seconds after the start at which each request was done."""
    if hasattr(engine, "serve"):
        return list(engine.serve(trace, num_beams))
    return static_batches(engine, trace, num_beams, max_batch)


def static_batches(engine: Any, trace: Sequence[engines.Arrival], num_beams: int, max_batch: int) -> list[float]:
    """What waits, up to `max_batch` requests, is one batch, which runs until its longest request is done."""
    begin, done = time.perf_counter(), list[float]()
    while len(done) < len(trace):
        now = time.perf_counter() - begin
        waiting = [arrival for arrival in trace[len(done) : len(done) + max_batch] if arrival[0] <= now]
        if not waiting:
            time.sleep(trace[len(done)][0] - now)
            continue
        lengths = [length for _, _, length in waiting]
        engine.generate([prompt for _, prompt, _ in waiting], None if None in lengths else lengths, num_beams)
        done += [time.perf_counter() - begin] * len(waiting)
    return done


def cpu_seconds() -> float:
    """Of this process and of those that it has started."""
    seconds = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            seconds += times.user + times.system
    return seconds


if __name__ == "__main__":
    main()
