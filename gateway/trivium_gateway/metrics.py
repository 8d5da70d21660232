"""What the gateway counts of its own work: calls, tokens, latencies. `exposition.py` shows it.

Plain numbers, written and read in the event loop only. Deltas are counted on their way to a call's sink (`metered`),
which costs well under a microsecond each: a latency is one bucket more, never a lookup by label.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from time import monotonic
from typing import TYPE_CHECKING

from trivium.outputs import ChoiceDelta
from trivium_gateway.errors import ClientDisconnectedError, client_error
from trivium_gateway.usage import TokenCounts

if TYPE_CHECKING:
    from trivium_gateway.generation import DeltaSink, Generation

# Seconds. The bounds of vLLM's histograms of the same name, and finer ones below, where small models are.
FIRST_TOKEN_BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
INTER_TOKEN_BOUNDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
CALL_BOUNDS = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip

ABORT, ERROR = "abort", "error"  # the client left; the server failed
FINISH_REASONS = ("stop", "length", ABORT, ERROR)
ENDPOINTS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics"})
OTHER_ENDPOINT = "other"


class Histogram:
    """How often a value fell between which bounds. A bound belongs to the bucket below it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        """Count `value` `weight` times."""
        self._counts[bisect_left(self._bounds, value)] += weight
        self.sum += value * weight

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many values were not above it), as Prometheus wants them; the last is `+Inf`."""
        names = [*map(str, self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))


@dataclass(slots=True)
class ModelMetrics:
    """Totals of one model since the start, and what runs now. Owner: GatewayMetrics.

    num_running, call_s: API calls, whatever the number of prompts and choices. finished: choices.
    first_token_s, inter_token_s: only of streamed calls; of the others the gateway sees no single tokens.
    """

    num_running: int = 0
    num_streams: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FINISH_REASONS, 0)))
    first_token_s: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS))
    inter_token_s: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_BOUNDS))
    call_s: Histogram = field(default_factory=lambda: Histogram(CALL_BOUNDS))


class GatewayMetrics:
    """All numbers of one application. Labels come from fixed sets, never from what a client sends."""

    def __init__(self, models: Sequence[str]) -> None:
        self.models = {name: ModelMetrics() for name in models}  # served name -> numbers
        self.num_unknown_fields = 0  # top-level fields of requests that were ignored
        self.responses: Counter[tuple[str, str, int]] = Counter()  # (endpoint, model, status) -> responses

    def count_response(self, path: str, model: object, status: int) -> None:
        """Count one response; a path or model that is not served is counted without its name."""
        endpoint = path if path in ENDPOINTS else OTHER_ENDPOINT
        self.responses[endpoint, model if isinstance(model, str) and model in self.models else "", status] += 1


class _MeteredSink:
    """A DeltaSink that counts what it passes on."""

    __slots__ = ("_began_s", "_is_streamed", "_last_s", "_metrics", "_sink", "has_output", "is_full", "num_finished")

    def __init__(self, generation: Generation, sink: DeltaSink) -> None:
        self._sink = sink
        self._metrics = generation.metrics
        self._began_s = generation.began_s
        self._is_streamed = generation.is_streamed
        self._last_s = [0.0] * generation.num_choices  # when the last tokens of a choice came
        self.has_output = False
        self.num_finished = 0
        self.is_full = sink.is_full  # asked after each delta: without a step between

    def add(self, choice: int, delta: ChoiceDelta) -> None:
        num_tokens = len(delta.token_ids)
        if num_tokens:
            metrics = self._metrics
            metrics.num_generation_tokens += num_tokens
            if self._is_streamed:
                now_s = monotonic()
                last_s = self._last_s[choice]
                self._last_s[choice] = now_s
                if last_s:
                    metrics.inter_token_s.observe((now_s - last_s) / num_tokens, num_tokens)
                elif not self.has_output:
                    metrics.first_token_s.observe(now_s - self._began_s)
            self.has_output = True
        if delta.finish_reason is not None:
            self.num_finished += 1
            self._metrics.finished[delta.finish_reason.value] += 1
        self._sink.add(choice, delta)

    async def wait_for_room(self) -> None:
        await self._sink.wait_for_room()


@contextmanager
def metered(generation: Generation, sink: DeltaSink) -> Iterator[DeltaSink]:
    """`sink`, with everything that passes counted for the model of `generation`, and how the call ends."""
    metrics, meter = generation.metrics, _MeteredSink(generation, sink)
    rest: str | None = ABORT  # why the choices that have no finish reason by then have ended
    metrics.num_running += 1
    metrics.num_streams += generation.is_streamed
    try:
        yield meter
        metrics.call_s.observe(monotonic() - generation.began_s)
    except ClientDisconnectedError:
        raise
    except Exception as error:
        rest = ERROR if client_error(error).http_status >= 500 else None  # a refused request has not run
        raise
    finally:
        metrics.num_running -= 1
        metrics.num_streams -= generation.is_streamed
        if meter.has_output:
            metrics.num_prompt_tokens += generation.usage(TokenCounts()).prompt_tokens
        if rest is not None:
            metrics.finished[rest] += generation.num_choices - meter.num_finished
