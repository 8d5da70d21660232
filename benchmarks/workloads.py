"""What is compared: for each checkpoint its peers, and what they do in turns.

Peers of a checkpoint start once, and end before those of the next one start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import arrivals
import goals
from checkpoints import LLAMA, LLAMA_FP32, MARIAN, QWEN3, Shape, checkpoint
from harness import (
    FEW,
    RESULTS,
    Effort,
    Report,
    Steps,
    Timing,
    Timings,
    alternate,
    decode_steps,
    progress,
    random_prompts,
)
from machine import Limits, measure_limits
from peers import Answer, Peer
from plots import plot_decode, plot_latencies
from roster import BFLOAT16, CONTINUOUS, CT2, CT2_HALF, CT2_INT8, EXACT, HALF, HF, HF_BF16, INT8, VLLM, Maker, Roster
from startup import seconds_to_first_token

NUM_BEAMS = 4
SMALL_BATCH = 8
PREFILL_PROMPTS, PREFILL_TOKENS = 8, 512
SHARED_TOKENS, OWN_TOKENS = 480, 32
STATIC_BATCH = 16  # of mixed requests
SENTENCE_BATCH = 32  # of those who translate one padded batch after another
LOAD = 0.7  # of the slower engine's throughput, when sentences arrive over time
# Of our throughput with one batch of them, when mixed requests arrive. More together are faster: with 1.25 the arrivals
# took 25 of our 29 s, and it was they that were measured.
OVERLOAD = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """effort: of each comparison. The rest says how much work there is in one run."""

    effort: Effort
    slow_effort: Effort
    prompt_tokens: int
    num_steps: int  # of decode, at large batches
    arrivals_shape: Shape
    num_arrivals: int
    num_sentences: int
    num_starts: int
    has_all_dtypes: bool

    def with_at_most(self, runs: int) -> Size:
        """The same work, `runs` times at most."""
        effort, slow = (replace(each, runs=min(runs, each.runs)) for each in (self.effort, self.slow_effort))
        return replace(self, effort=effort, slow_effort=slow)

    def steps_of(self, batch: int) -> int:
        """More of those that are short."""
        return self.num_steps if batch > SMALL_BATCH else 2 * self.num_steps


QUICK = Size(
    effort=Effort(3, budget_s=35, at_least=2),
    slow_effort=Effort(2, budget_s=50),
    prompt_tokens=32,
    num_steps=16,
    arrivals_shape=LLAMA,
    num_arrivals=32,
    num_sentences=40,
    num_starts=2,
    has_all_dtypes=False,
)
FULL = Size(
    effort=Effort(5),
    slow_effort=Effort(3),
    prompt_tokens=128,
    num_steps=32,
    arrivals_shape=QWEN3,
    num_arrivals=64,
    num_sentences=200,
    num_starts=5,
    has_all_dtypes=True,
)


@dataclass(slots=True)
class Bench:
    """One run. Owner of `limits`, which grow as the machine shows more."""

    report: Report
    maker: Maker
    size: Size
    workloads: Sequence[str]
    batches: Sequence[int]
    name: str
    limits: Limits = field(init=False)

    def __post_init__(self) -> None:
        self.limits = measure_limits(self.maker.num_threads)

    def wants(self, *workloads: str) -> bool:
        return any(workload in self.workloads for workload in workloads)

    def roster(self, shape: Shape, *names: str) -> Roster:
        roster = Roster(self.maker, shape, names)
        self.report.add(f"# {shape.name}\n")
        self.report.describe(roster.all_started, roster.missing)
        return roster

    def measure_limits(self) -> None:
        self.limits = self.limits.best(measure_limits(self.maker.num_threads))

    def plot_path(self, what: str) -> Path:
        return RESULTS / f"{self.name}-{what}.png"


def run(bench: Bench) -> None:
    if bench.wants("decode", "prefill", "prefix", "start"):
        exact(bench)
    if bench.wants("decode"):
        packed(bench)
    if bench.wants("arrivals"):
        mixed_arrivals(bench)
    if bench.wants("translation"):
        translation(bench)


def exact(bench: Bench) -> None:
    """Llama in float32."""
    with bench.roster(LLAMA_FP32, EXACT, HF, CT2, VLLM) as roster:
        if bench.wants("start"):
            start(bench, roster)
        if bench.wants("decode"):
            decode(bench, roster, {EXACT: ("float32", 4)})
        if bench.wants("prefill"):
            prefill(bench, roster, goals.PREFILL, EXACT)
        if bench.wants("prefix"):
            shared_prefix(bench, roster)


def packed(bench: Bench) -> None:
    """The same with weights of 16 and 8 bits, as the checkpoint's dtype and a user's setting want it."""
    more = (HF_BF16,) if bench.size.has_all_dtypes else ()
    with bench.roster(LLAMA, HALF, BFLOAT16, INT8, CT2, CT2_HALF, CT2_INT8, *more) as roster:
        decode(bench, roster, {HALF: ("16-bit", 2), INT8: ("int8", 1)})
        if bench.size.has_all_dtypes:
            prefill(bench, roster, f"{goals.PREFILL} 16-bit", HALF)


def start(bench: Bench, roster: Roster) -> None:
    """From the start of a process to the first token: of libraries once, of `trivium serve` several times."""
    prompt = random_prompts(1, bench.size.prompt_tokens, roster.shape.vocab_size, seed=-1)

    def first_token(peer: Peer, _: int) -> Answer:
        answer = peer.generate(prompt, 1)
        return Answer(None, peer.start_seconds + answer.seconds, answer.cpu_seconds)

    timings = {name: Timing(timing.seconds) for name, timing in alternate(roster.alive, first_token, Effort(1)).items()}
    progress("starting trivium serve")
    try:
        model = str(checkpoint(roster.shape))
        seconds = [seconds_to_first_token(model, prompt[0]) for _ in range(bench.size.num_starts)]
        timings = {goals.SERVE: Timing(tuple(seconds)), **timings}
    except (RuntimeError, OSError) as error:
        bench.report.add(f"{goals.SERVE}: {error}\n")
    title = "Start of a process to first token; the libraries without a server"
    bench.report.record(goals.START, timings, title=title, ours=goals.SERVE, unit="s", missing=roster.missing)


def decode(bench: Bench, roster: Roster, kinds: dict[str, tuple[str, int]]) -> None:
    """kinds: of each of our own peers, the word for its kind and the bytes of a weight."""
    size, shape = bench.size, roster.shape
    steps: dict[int, Timings] = {}
    for batch in bench.batches:
        progress(f"{shape.name}: decode, batch {batch}")
        bench.measure_limits()
        steps[batch] = decode_steps(
            roster.alive,
            _prompts(shape, batch, size.prompt_tokens),
            Steps(many=FEW + size.steps_of(batch)),
            size.effort,
        )
        bench.measure_limits()
        for ours, (kind, weight_bytes) in kinds.items():
            bench.report.record(
                goals.decode_key(kind, batch),
                steps[batch],
                title=f"{shape.name}: decode step, batch {batch}, against {ours}",
                ours=ours,
                missing=roster.missing,
            )
            if ours in steps[batch]:
                against_limit(bench, shape, batch, kind=kind, weight_bytes=weight_bytes, ours=ours)
    plot_decode(steps, f"{shape.name}: decode step", bench.plot_path(f"{shape.name}-decode"))


def against_limit(bench: Bench, shape: Shape, batch: int, *, kind: str, weight_bytes: int, ours: str) -> None:
    size = bench.size
    context = size.prompt_tokens + FEW + size.steps_of(batch) // 2
    least = bench.limits.step_seconds(shape, num_rows=batch, context=context, weight_bytes=weight_bytes)
    timing = bench.report.results[goals.decode_key(kind, batch)][ours]
    limit = Timing((least,) * len(timing.seconds))
    bench.report.results[goals.limit_key(kind, batch)] = {ours: timing, goals.LIMIT: limit}
    bench.report.add(
        f"{ours} takes {timing.median / least:.2f} times (shortest {timing.minimum / least:.2f}) what the machine's "
        f"limits allow ({1e3 * least:.2f} ms: {bench.limits}).\n"
    )


def prefill(bench: Bench, roster: Roster, key: str, ours: str) -> None:
    progress(f"{roster.shape.name}: prefill")
    make_prompts = _prompts(roster.shape, PREFILL_PROMPTS, PREFILL_TOKENS)
    alternate(roster.alive, lambda peer, _: peer.generate(make_prompts(-1)[:2], 1), Effort(1))
    timings = alternate(roster.alive, lambda peer, run: peer.generate(make_prompts(run), 1), bench.size.effort)
    title = f"{roster.shape.name}: prefill, {PREFILL_PROMPTS} prompts of {PREFILL_TOKENS} tokens"
    bench.report.record(key, timings, title=title, ours=ours, missing=roster.missing)


def shared_prefix(bench: Bench, roster: Roster) -> None:
    """Prompts with a beginning that they see for the first time, all at once, and then others with the same one."""
    effort = bench.size.effort
    for word, first_seed in (("new", 0), ("known", 1000)):
        progress(f"{roster.shape.name}: {word} shared prefixes")
        make_prompts = _sharing_prompts(roster.shape, first_seed)

        def work(peer: Peer, run: int, make: Callable[[int], list[list[int]]] = make_prompts) -> Answer:
            return peer.generate(make(run), 1, num_shared=SHARED_TOKENS)

        timings = alternate(roster.alive, work, effort)
        title = f"{PREFILL_PROMPTS} prompts of {SHARED_TOKENS} {word} shared and {OWN_TOKENS} own tokens"
        key = f"{goals.PREFIX} {word}"
        bench.report.record(key, timings, title=f"{roster.shape.name}: {title}", ours=EXACT, missing=roster.missing)
        effort = Effort(min((len(timing.seconds) for timing in timings.values()), default=0))


def _sharing_prompts(shape: Shape, first_seed: int) -> Callable[[int], list[list[int]]]:
    """From the number of the run, which decides what they share; first_seed: of their own parts."""

    def make(run: int) -> list[list[int]]:
        shared = random_prompts(1, SHARED_TOKENS, shape.vocab_size, seed=run)[0]
        owns = random_prompts(PREFILL_PROMPTS, OWN_TOKENS, shape.vocab_size, seed=first_seed + run)
        return [shared + own for own in owns]

    return make


def mixed_arrivals(bench: Bench) -> None:
    size, shape = bench.size, bench.size.arrivals_shape
    more = (VLLM,) if shape is not QWEN3 else ()  # 5 GB more than 24 GB, beside the four others of that size
    with bench.roster(shape, HALF, CONTINUOUS, HF, CT2, *more) as roster:
        warm = arrivals.requests(shape, STATIC_BATCH, 1.0, seed=-1)
        prompts = [request.prompt for request in warm]
        alternate(roster.alive, lambda peer, _: peer.generate(prompts, 2), Effort(1))
        burst = arrivals.requests(shape, STATIC_BATCH, 1e6, seed=-2)
        at_once = arrivals.serve(roster.only(HALF), lambda _: burst, Effort(1), max_batch=1).makespans
        if HALF not in at_once:
            return
        rate = OVERLOAD * STATIC_BATCH / at_once[HALF].median
        progress(f"{shape.name}: {size.num_arrivals} arrivals, {rate:.2f} per second")
        served = arrivals.serve(
            roster.alive,
            lambda run: arrivals.requests(shape, size.num_arrivals, rate, seed=run),
            size.slow_effort,
            max_batch=STATIC_BATCH,
        )
        key = goals.ARRIVALS if shape is QWEN3 else f"{goals.ARRIVALS} {shape.name}"
        title = (
            f"{shape.name}: {size.num_arrivals} mixed requests, {rate:.2f} per second, until the last token "
            f"({HF} and CTranslate2 in static batches of {STATIC_BATCH})"
        )
        bench.report.record(key, served.makespans, title=title, ours=HALF, unit="s", missing=roster.missing)
        _latencies(bench, served, f"{shape.name}, arriving", f"{shape.name}-arrivals")


def translation(bench: Bench) -> None:
    size = bench.size
    more = (INT8, CT2_INT8) if size.has_all_dtypes else ()
    with bench.roster(MARIAN, EXACT, HF, CT2, *more) as roster:
        timings = translation_at_once(bench, roster)
        measured = [timings[name].median for name in (EXACT, CT2) if name in timings]
        if len(measured) == 2:
            translation_over_time(bench, roster, LOAD * size.num_sentences / max(measured))


def translation_at_once(bench: Bench, roster: Roster) -> Timings:
    count = bench.size.num_sentences
    differing: dict[str, int] = {}  # name of the peer -> outputs that are not the source

    def work(peer: Peer, run: int) -> Answer:
        sources = [sentence.prompt for sentence in arrivals.sentences(MARIAN, count if run >= 0 else 4, 1.0, seed=run)]
        answer = peer.generate(sources, None, num_beams=NUM_BEAMS, max_batch=SENTENCE_BATCH)
        wrong = sum(list(output) != source for output, source in zip(answer.value, sources, strict=True))
        differing[peer.name] = differing.get(peer.name, 0) + wrong
        return answer

    alternate(roster.alive, lambda peer, _: work(peer, -1), Effort(1))
    progress(f"{MARIAN.name}: {count} sentences at once")
    timings = alternate(roster.alive, work, bench.size.slow_effort)
    title = f"{MARIAN.name}: {count} sentences at once, {NUM_BEAMS} beams (static batches have {SENTENCE_BATCH})"
    bench.report.record(goals.TRANSLATION, timings, title=title, ours=EXACT, unit="s", missing=roster.missing)
    wrong = {name: number for name, number in differing.items() if number}
    bench.report.add(f"Outputs that differ from the copy that the model makes: {wrong or 'none'}.\n")
    return timings


def translation_over_time(bench: Bench, roster: Roster, rate: float) -> None:
    """rate: sentences per second."""
    count = bench.size.num_sentences
    progress(f"{MARIAN.name}: {count} sentences, {rate:.2f} per second")
    served = arrivals.serve(
        roster.only(EXACT, CT2, INT8, CT2_INT8),
        lambda run: arrivals.sentences(MARIAN, count, rate, seed=1000 + run),
        bench.size.slow_effort,
        num_beams=NUM_BEAMS,
        max_batch=SENTENCE_BATCH,
    )
    title = (
        f"{MARIAN.name}: p99 latency, {count} sentences, {rate:.2f} per second ({LOAD:.0%} of the slower throughput)"
    )
    bench.report.record(goals.TRANSLATION_P99, served.percentiles(99), title=title, ours=EXACT, unit="s")
    _latencies(bench, served, f"{MARIAN.name}, arriving", f"{MARIAN.name}-arrivals")


def _latencies(bench: Bench, served: arrivals.Served, title: str, plot_name: str) -> None:
    bench.report.add(served.table())
    last = {name: served.latencies[name][-1] for name in served.makespans}
    plot_latencies(last, title, bench.plot_path(plot_name))


def _prompts(shape: Shape, count: int, length: int) -> Callable[[int], list[list[int]]]:
    return lambda seed: random_prompts(count, length, shape.vocab_size, seed=seed)
