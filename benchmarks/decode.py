"""Decode steps of a 135M-parameter Llama against the peers: python benchmarks/decode.py [--threads N] [--runs N]

The checkpoint is stored in bfloat16, as published ones are; everyone computes in float32, or int8 where it says so.
"""

from __future__ import annotations

import argparse
import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from checkpoints import LLAMA, QWEN3, Shape
from harness import COMPARE_HEADER, Report, Steps, compare, decode_steps, random_prompts, table
from peers import CTranslate2, Peer, Transformers, Trivium

from trivium.executor.threads import count_cores

PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--full", action="store_true", help="Qwen3-0.6B, too")
    parser.add_argument("--trivium-only", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    report = Report("Decode step", args.threads)
    for shape in (LLAMA, QWEN3) if args.full else (LLAMA,):
        measure(report, shape, args)
    if not args.trivium_only:
        report.save("decode")


def measure(report: Report, shape: Shape, args: argparse.Namespace) -> None:
    peers: list[Peer] = [
        Trivium(shape, args.threads),
        Trivium(shape, args.threads, name="trivium int8", quantization="int8"),
    ]
    if not args.trivium_only:
        peers += [
            Transformers(shape, args.threads),
            CTranslate2(shape, args.threads),
            CTranslate2(shape, args.threads, "int8"),
        ]
    for batch in args.batches:
        prompts = random_prompts(batch, PROMPT_TOKENS, shape.vocab_size)
        timings = decode_steps(peers, prompts, Steps(), args.runs)
        report.add(f"## {shape.name}, {batch} requests\n\n" + table(COMPARE_HEADER, compare(timings, peers[0].name)))
    for peer in peers:
        peer.close()


if __name__ == "__main__":
    main()
