"""Beam search in one run: python benchmarks/beam.py [--threads N] [--runs N]

Beam 4 against our own greedy step, against transformers' generate on BART-base and T5-small, and against CTranslate2
on a Marian shape. A ratio above 1 says that the other side takes longer.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import BART, MARIAN, T5, Shape
from harness import COMPARE_HEADER, Report, Steps, Timing, compare, decode_steps, random_prompts, table
from peers import CTranslate2, Peer, Transformers, Trivium

from trivium.executor.threads import count_cores

NUM_BEAMS = 4
SOURCE_TOKENS = 64
GREEDY, BEAMS = Steps(), Steps(num_beams=NUM_BEAMS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trivium-only", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    report = Report(f"Beam search, {NUM_BEAMS} beams, {SOURCE_TOKENS} source tokens", args.threads)
    for shape in (BART, T5, MARIAN):
        measure(report, shape, args)
    if not args.trivium_only:
        report.save("beam")


def measure(report: Report, shape: Shape, args: argparse.Namespace) -> None:
    ours = Trivium(shape, args.threads)
    peers: list[Peer] = [ours]
    if not args.trivium_only:
        peers += [Transformers(shape, args.threads), CTranslate2(shape, args.threads)]
    for batch in (1, 8):
        prompts = random_prompts(batch, SOURCE_TOKENS, shape.vocab_size)
        beams = decode_steps(peers, prompts, BEAMS, args.runs)
        greedy = decode_steps([ours], prompts, GREEDY, args.runs)[ours.name]
        title = f"## {shape.name}, {batch} request{'s' if batch > 1 else ''}\n\n"
        report.add(title + table(COMPARE_HEADER, compare(beams, ours.name)) + _own_ratio(beams[ours.name], greedy))
    for peer in peers:
        peer.close()


def _own_ratio(beams: Timing, greedy: Timing) -> str:
    return (
        f"\nOur own greedy step takes {1e3 * greedy.minimum:.2f} ms: beams / greedy is "
        f"{beams.minimum / greedy.minimum:.2f} (medians {beams.median / greedy.median:.2f}, "
        f"CPU time {min(beams.cpu_seconds) / min(greedy.cpu_seconds):.2f}).\n"
    )


if __name__ == "__main__":
    main()
