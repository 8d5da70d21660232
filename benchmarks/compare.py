"""This project and its peers on the same checkpoints, alternating: python benchmarks/compare.py [--full]

Start, decode, prefill and shared prefixes of a Llama of 135M parameters, mixed requests that arrive over time, and
translation with four beams. Each peer runs in a process of its own; TRIVIUM_BENCH_VLLM names the Python interpreter of
an environment with vLLM. Without --full a run takes minutes: less work, fewer runs, and arrivals for the Llama instead
of Qwen3-0.6B. Prints ratios with minimum and spread, and which goals are met; writes that and plots to
benchmarks/results/. Checkpoints are random, of real shapes, and kept in the temporary folder.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from goals import goals_table
from harness import RESULTS, Report, progress
from plots import plot_goals
from roster import Maker
from workloads import FULL, QUICK, Bench, run

from trivium.executor.threads import count_cores

WORKLOADS = ("start", "decode", "prefill", "prefix", "arrivals", "translation")


def main() -> None:
    args = parse()
    logging.disable(logging.WARNING)
    report = Report(f"Speed on a CPU{', full' if args.full else ''}", args.threads)
    report.add(f"OpenMP threads of peers {'wait as by default' if args.peers_spin else 'sleep when idle, as ours'}.\n")
    bench = Bench(
        report,
        Maker(args.threads, peers_spin=args.peers_spin, vllm_is_eager=not args.vllm_compiles),
        (FULL if args.full else QUICK).with_at_most(args.runs),
        args.workloads,
        args.batches,
        args.name,
    )
    try:
        run(bench)
    finally:
        report.add(f"# Goals\n\n{goals_table(report.results)}")
        report.add(f"The most that the machine has shown: {bench.limits}.\n")
        plot_goals(report.results, RESULTS / f"{args.name}-goals.png")
        progress(f"written: {report.save(args.name)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--full", action="store_true", help="more work, more runs, Qwen3-0.6B")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--runs", type=int, default=5, help="of each comparison, at most")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="of decode")
    parser.add_argument("--peers-spin", action="store_true", help="threads of peers wait as by default, not as ours")
    parser.add_argument("--vllm-compiles", action="store_true", help="vLLM with its compiler: starts in minutes")
    parser.add_argument("--name", default="compare", help="of the files under benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
