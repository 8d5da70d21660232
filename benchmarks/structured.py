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
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import LLAMA_TEXT, checkpoint
from harness import Effort, Ratio, Report, Steps, decode_steps, random_prompts, table
from peers import Answer, Prompts

from trivium import LLM, SamplingParams, StructuredOutputsParams, TokensPrompt
from trivium.executor.grammars import GrammarRows
from trivium.executor.model_runner import ModelRunner
from trivium.executor.threads import count_cores

PROMPT_TOKENS = 64
STEPS = Steps(many=72)
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

    is_alive = True

    def __init__(self, name: str, llm: LLM, structured: StructuredOutputsParams | None) -> None:
        self.name = name
        self._llm = llm
        self._structured = structured

    def generate(self, prompts: Prompts, num_tokens: int, *, num_beams: int = 1) -> Answer:
        assert num_beams == 1, "sampled"
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
        begin, cpu_begin = time.perf_counter(), time.process_time()
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        assert all(len(ids) == num_tokens for ids in token_ids), "an output has ended"
        return Answer(token_ids, seconds, cpu_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    report = Report(f"Structured output, {LLAMA_TEXT.name}, {PROMPT_TOKENS} prompt tokens", args.threads)
    stopwatch = Stopwatch()
    for owner, name in ((ModelRunner, "start"), (GrammarRows, "mask"), (GrammarRows, "advance")):
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
    "masks and matchers, us",
    "per row, us",
    "share of the step",
    "with / without a schema",
)
NOTE = """
Times but for the last column are CPU time of the executor's decode steps, means. The last column compares the steps as
a caller sees them, in turns (shortest wall-clock time / median CPU time): on a busy machine it says little.
"""


class Stopwatch:
    """CPU seconds that methods of the executor take, call by call."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}  # method -> of each call

    def watch(self, owner: type, name: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)
        times = self.seconds.setdefault(name, [])

        def timed(*args: Any) -> Any:
            begin = time.thread_time()
            try:
                return method(*args)
            finally:
                times.append(time.thread_time() - begin)

        setattr(owner, name, timed)

    def take(self, name: str) -> list[float]:
        """The times of the last calls, which are forgotten."""
        taken = self.seconds[name][:]
        self.seconds[name].clear()
        return taken


def measure(free: Sampled, bound: Sampled, batch: int, runs: int, stopwatch: Stopwatch) -> list[str]:
    def make_prompts(seed: int) -> list[list[int]]:
        return random_prompts(batch, PROMPT_TOKENS, LLAMA_TEXT.vocab_size, seed)

    steps = decode_steps([free, bound], make_prompts, STEPS, Effort(runs))
    names = ("start", "mask", "advance")
    for name in names:
        stopwatch.take(name)
    bound.generate(make_prompts(-2), STEPS.many)
    _prefill, *executed = stopwatch.take("start")
    step_s = statistics.fmean(executed)
    cost_s = sum(sum(stopwatch.take(name)) for name in names[1:]) / STEPS.many
    ratio = Ratio.of(steps[bound.name], steps[free.name])
    return [
        str(batch),
        f"{1e3 * step_s:.2f}",
        f"{1e6 * cost_s:.0f}",
        f"{1e6 * cost_s / batch:.1f}",
        f"{cost_s / step_s:.1%}",
        f"{ratio.shortest:.2f} / {ratio.cpu:.2f}",
    ]


if __name__ == "__main__":
    main()
