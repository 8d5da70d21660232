"""This project and its peers on the same checkpoints, alternating: python benchmarks/compare.py [--full]

Decode and prefill of a Llama of 135M parameters, shared prefixes, a Poisson trace, translation with four beams; with
--full also Qwen3-0.6B and more runs. Prints ratios with minimum and spread, and writes Markdown and plots to
benchmarks/results/. Checkpoints are random, of real shapes, and kept in the temporary folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

import matplotlib

matplotlib.use("Agg")
import arrivals
import numpy as np
from checkpoints import LLAMA, MARIAN, QWEN3, Shape
from harness import (
    COMPARE_HEADER,
    RESULTS,
    Report,
    Steps,
    Timing,
    alternate,
    compare,
    decode_steps,
    random_prompts,
    table,
)
from machine import Limits, measure_limits
from matplotlib import pyplot
from peers import CTranslate2, Peer, Transformers, Trivium

from trivium.executor.threads import count_cores

WORKLOADS = ("decode", "prefill", "prefix", "arrivals", "translation")
PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--full", action="store_true", help="Qwen3-0.6B, too, and five runs")
    parser.add_argument("--name", default="compare", help="of the files under benchmarks/results")
    args = parser.parse_args()
    if args.full:
        args.runs = max(args.runs, 5)
    logging.disable(logging.WARNING)
    report = Report("Speed on a CPU", args.threads)
    limits = measure_limits(args.threads)
    report.add(f"Limits of the machine in this run: {limits}.\n")
    for shape in (LLAMA, QWEN3) if args.full else (LLAMA,):
        decoder_only(report, shape, limits, args)
    if "translation" in args.workloads:
        translation(report, args)
    report.save(args.name)


def make_peers(shape: Shape, num_threads: int) -> list[Peer]:
    """This project first."""
    return [
        Trivium(shape, num_threads),
        Trivium(shape, num_threads, name="trivium int8", quantization="int8"),
        Transformers(shape, num_threads),
        CTranslate2(shape, num_threads),
        CTranslate2(shape, num_threads, "int8"),
    ]


def decoder_only(report: Report, shape: Shape, limits: Limits, args: argparse.Namespace) -> None:
    peers = make_peers(shape, args.threads)
    if "decode" in args.workloads:
        decode(report, shape, peers, limits, args)
    if "prefill" in args.workloads:
        prompts = random_prompts(8, 512, shape.vocab_size)
        timings = alternate(peers, lambda peer: peer.generate(prompts, 1), args.runs)
        add(report, f"{shape.name}: prefill, 8 prompts of 512 tokens", timings, peers)
    if "prefix" in args.workloads:
        shared_prefix(report, shape, peers[2:], args)
    if "arrivals" in args.workloads:
        arrival_trace(report, shape, peers[2:4], args)
    for peer in peers:
        peer.close()


def decode(report: Report, shape: Shape, peers: list[Peer], limits: Limits, args: argparse.Namespace) -> None:
    steps: dict[int, dict[str, Timing]] = {}  # batch size -> peer -> time of a step
    for batch in args.batches:
        prompts = random_prompts(batch, PROMPT_TOKENS, shape.vocab_size)
        steps[batch] = decode_steps(peers, prompts, Steps(), args.runs)
        add(report, f"{shape.name}: decode step, {batch} requests", steps[batch], peers)
        # The checkpoint is stored in 16 bits, and may be read so.
        share = steps[batch][peers[0].name].minimum / limits.step_seconds(shape, batch, weight_bytes=2)
        report.add(f"Our step takes {share:.2f} times what the machine's limits allow for its matrix products.\n")
    plot(steps, f"{shape.name}: decode step", RESULTS / f"{args.name}-{shape.name}-decode.png")


def shared_prefix(report: Report, shape: Shape, peers: list[Peer], args: argparse.Namespace) -> None:
    """Prompts of 480 shared tokens and 32 of their own; only this project keeps what it has computed."""
    caching = Trivium(shape, args.threads, name="trivium, prefix cache", enable_prefix_caching=True)
    shared = random_prompts(1, 480, shape.vocab_size)[0]
    prompts = [shared + own for own in random_prompts(8, 32, shape.vocab_size, seed=1)]
    timings = alternate([caching, *peers], lambda peer: peer.generate(prompts, 1), args.runs)
    add(report, f"{shape.name}: 8 prompts of 480 shared and 32 own tokens", timings, [caching])
    caching.close()


def arrival_trace(report: Report, shape: Shape, peers: list[Peer], args: argparse.Namespace) -> None:
    rate = 0.7 * arrivals.static_rate(peers[0], shape)
    trace = arrivals.make_trace(shape, 100 if args.full else 30, rate)
    latencies = {"trivium": arrivals.our_latencies(shape, args.threads)(trace)}
    latencies |= {f"{peer.name}, static batches": arrivals.static_batches(peer, trace) for peer in peers}
    rows = []
    for name, values in latencies.items():
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        rows.append([name, f"{p50:.2f}", f"{p90:.2f}", f"{p99:.2f}"])
    title = f"## {shape.name}: {len(trace)} requests, {rate:.2f} per second, seconds to the last token\n\n"
    report.add(title + table(("", "p50", "p90", "p99"), rows))


def translation(report: Report, args: argparse.Namespace) -> None:
    """Marian shape, 4 beams, 16 sources of 8 to 40 tokens, 24 tokens each."""
    peers = make_peers(MARIAN, args.threads)
    prompts = [random_prompts(1, 8 + 2 * index, MARIAN.vocab_size, seed=index)[0] for index in range(16)]
    timings = alternate(peers, lambda peer: peer.generate(prompts, 24, 4), args.runs)
    add(report, f"{MARIAN.name}: translation, 4 beams, 16 sources of different length", timings, peers)
    for peer in peers:
        peer.close()


def add(report: Report, title: str, timings: dict[str, Timing], peers: list[Peer]) -> None:
    report.add(f"## {title}\n\n" + table(COMPARE_HEADER, compare(timings, peers[0].name)))


def plot(steps: dict[int, dict[str, Timing]], title: str, path: os.PathLike[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    names = list(next(iter(steps.values())))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [place + index * width for place in range(len(steps))]
        axes.bar(places, [1e3 * timings[name].minimum for timings in steps.values()], width, label=name)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(steps))], [f"{batch} requests" for batch in steps])
    axes.set_yscale("log")
    axes.set_ylabel("ms, shortest run")
    axes.set_title(title)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
