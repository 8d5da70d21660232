"""What a grammar costs: python benchmarks/structured.py [--threads N] [--runs N]

Decode steps of a Llama of 135M parameters (random weights, a vocabulary of real text) with and without a JSON schema,
in turns, sampled at temperature 1 with the same seeds. Prints the cost of a grammar per step and row, and its share of
the throughput. A model with random weights writes any token that the schema allows, and so long strings above all,
whose masks are the dearest ones.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import LLAMA_TEXT, checkpoint
from harness import Report, random_prompts, table
from peers import Prompts

from trivium import LLM, SamplingParams, StructuredOutputsParams, TokensPrompt
from trivium.executor.grammars import GrammarRows
from trivium.executor.model_runner import ModelRunner
from trivium.executor.threads import count_cores

PROMPT_TOKENS = 64
NUM_TOKENS = 72
NUM_FIRST = 4  # calls of a run that are not counted: the prompts, and requests that do not run together yet
NAMES = ("start", "mask", "advance")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "kind": {"enum": ["customer", "supplier", "employee"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string"},
                "city": {"type": "string"},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street", "city", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "kind", "tags", "address"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PERSON, "minItems": 1000}  # no output of this benchmark ends


class Sampled:
    """`generate` of a shared engine in this process, with a grammar or without."""

    def __init__(self, name: str, llm: LLM, structured: StructuredOutputsParams | None) -> None:
        self.name = name
        self._llm = llm
        self._structured = structured

    def generate(self, prompts: Prompts, num_tokens: int) -> None:
        params: Sequence[SamplingParams] = [
            SamplingParams(
                seed=row,
                max_tokens=num_tokens,
                ignore_eos=True,
                detokenize=False,
                structured_outputs=self._structured,
            )
            for row in range(len(prompts))
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        lengths = {len(output.outputs[0].token_ids) for output in outputs}
        assert lengths == {num_tokens}, "an output has ended"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    report = Report(f"Structured output, {LLAMA_TEXT.name}, {PROMPT_TOKENS} prompt tokens", args.threads)
    stopwatch = Stopwatch()
    for owner, name in zip((ModelRunner, GrammarRows, GrammarRows), NAMES, strict=True):
        stopwatch.watch(owner, name)
    with LLM(
        str(checkpoint(LLAMA_TEXT)),
        num_threads=args.threads,
        kv_cache_memory_bytes=2**30,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        generation_config="none",
    ) as llm:
        free = Sampled("no grammar", llm, None)
        bound = Sampled("JSON schema", llm, StructuredOutputsParams(json=ENDLESS))
        rows = [measure(free, bound, batch, args.runs, stopwatch) for batch in args.batches]
    report.add(table(HEADER, rows) + NOTE)
    report.save("structured")


HEADER = (
    "requests",
    "step, ms",
    "step with a schema, ms",
    "with / without: CPU time",
    "with / without: wall-clock",
    "masks and matchers, us",
    "per row, us",
    "share of the step",
)
NOTE = """
Decode steps of the executor, with a schema and without in turns. CPU time of the thread that runs the steps, means: it
takes part in every operator, and computes the masks alone. Wall-clock: ratio of medians, each of one step, which says
something on an idle machine only; there it is the throughput that a schema costs.
"""


@dataclass(frozen=True, slots=True)
class Call:
    """Seconds of one call: CPU time of its thread, and by the clock on the wall."""

    cpu_s: float
    wall_s: float


class Stopwatch:
    """What calls of methods of the executor take."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Call]] = {}  # method -> its calls

    def watch(self, owner: type, name: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)
        calls = self.calls.setdefault(name, [])

        def timed(*args: Any) -> Any:
            begin, cpu_begin = time.perf_counter(), time.thread_time()
            try:
                return method(*args)
            finally:
                calls.append(Call(time.thread_time() - cpu_begin, time.perf_counter() - begin))

        setattr(owner, name, timed)

    def take(self, name: str) -> list[Call]:
        """The last calls, which are forgotten."""
        taken = self.calls[name][:]
        self.calls[name].clear()
        return taken


def measure(free: Sampled, bound: Sampled, batch: int, runs: int, stopwatch: Stopwatch) -> list[str]:
    """A row of the table, after a first run of each that is not counted."""
    steps: dict[str, list[Call]] = {free.name: [], bound.name: []}
    masks: list[Call] = []
    for run in range(-1, runs):
        for sampled in (free, bound) if run % 2 else (bound, free):
            for name in NAMES:
                stopwatch.take(name)
            sampled.generate(random_prompts(batch, PROMPT_TOKENS, LLAMA_TEXT.vocab_size, run), NUM_TOKENS)
            if run >= 0:
                steps[sampled.name] += stopwatch.take("start")[NUM_FIRST:]
                masks += stopwatch.take("mask") + stopwatch.take("advance")
    step_s, bound_s = (statistics.fmean(call.cpu_s for call in steps[peer.name]) for peer in (free, bound))
    wall_s, bound_wall_s = (statistics.median(call.wall_s for call in steps[peer.name]) for peer in (free, bound))
    cost_s = sum(call.cpu_s for call in masks) / runs / NUM_TOKENS
    return [
        str(batch),
        f"{1e3 * step_s:.2f}",
        f"{1e3 * bound_s:.2f}",
        f"{bound_s / step_s:.3f}",
        f"{bound_wall_s / wall_s:.3f}",
        f"{1e6 * cost_s:.0f}",
        f"{1e6 * cost_s / batch:.1f}",
        f"{cost_s / bound_s:.1%}",
    ]


if __name__ == "__main__":
    main()
