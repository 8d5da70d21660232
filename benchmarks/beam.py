"""Beam search in one run: python benchmarks/beam.py [--threads N] [--runs N] [--trivium-only]

Decode steps of four beams on BART-base, T5-small and a Marian shape, against transformers' generate, CTranslate2 and
our own greedy step. A ratio above 1 says that the other side takes longer.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import BART, MARIAN, T5
from harness import FEW, Effort, Ratio, Report, Steps, Timing, decode_steps, progress, random_prompts
from roster import CT2, EXACT, HF, Maker, Roster

from trivium.executor.threads import count_cores

NUM_BEAMS = 4
SOURCE_TOKENS = 64
NUM_STEPS = 20
GREEDY, BEAMS = Steps(FEW + NUM_STEPS), Steps(FEW + NUM_STEPS, num_beams=NUM_BEAMS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trivium-only", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    report = Report(f"Beam search, {NUM_BEAMS} beams, {SOURCE_TOKENS} source tokens", args.threads)
    names = (EXACT,) if args.trivium_only else (EXACT, HF, CT2)
    for shape in (BART, T5, MARIAN):
        with Roster(Maker(args.threads), shape, names) as roster:
            report.add(f"# {shape.name}\n")
            report.describe(roster.all_started, roster.missing)
            for batch in (1, 8):
                measure(report, roster, batch, Effort(args.runs))
    if not args.trivium_only:
        report.save("beam")


def measure(report: Report, roster: Roster, batch: int, effort: Effort) -> None:
    shape = roster.shape
    title = f"{shape.name}, batch {batch}"
    progress(title)

    def make_prompts(seed: int) -> list[list[int]]:
        return random_prompts(batch, SOURCE_TOKENS, shape.vocab_size, seed=seed)

    beams = decode_steps(roster.alive, make_prompts, BEAMS, effort)
    report.record(title, beams, title=title, ours=EXACT, missing=roster.missing)
    greedy = decode_steps(roster.only(EXACT), lambda seed: make_prompts(1000 + seed), GREEDY, effort)
    if EXACT in beams and EXACT in greedy:
        report.add(_own_ratio(beams[EXACT], greedy[EXACT]))


def _own_ratio(beams: Timing, greedy: Timing) -> str:
    ratio = Ratio.of(beams, greedy)
    return (
        f"Our own greedy step takes {1e3 * greedy.median:.2f} ms: beams / greedy is {ratio.medians:.2f} "
        f"(shortest {ratio.shortest:.2f}, CPU time {ratio.cpu:.2f}).\n"
    )


if __name__ == "__main__":
    main()
