"""The spans of the scheduler: one per request, `generate MODEL`, from admission to the last delta.

The engine loop knows nothing of it: `TracedEngineLoop` puts a `RequestTrace` between the loop and a client's sink, for
requests whose span is recorded. All others take the plain way.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from opentelemetry.trace import Span

from trivium import telemetry
from trivium.config import SchedulerConfig
from trivium.errors import TriviumError
from trivium.inputs import GenerationRequest
from trivium.outputs import ChoiceDelta, FinishReason
from trivium.scheduler.detokenizer_client import DetokenizerClient
from trivium.scheduler.engine_loop import EngineLoop
from trivium.scheduler.executor_client import ExecutorClient
from trivium.scheduler.output_processor import DeltaSink
from trivium.scheduler.request import Request


class RequestTrace:
    """A DeltaSink that notes on `span` what passes on its way to `sink`. Owner: TracedEngineLoop.

    Ends with the last delta of the last choice, an error or an abort, whichever is first.
    """

    def __init__(
        self,
        span: Span,
        sink: DeltaSink,
        *,
        is_streamed: bool,
        num_choices: int,
        on_end: Callable[[RequestTrace], None],
    ) -> None:
        self.keys: tuple[int, ...] = ()  # of the choices that run
        self._num_choices = num_choices  # that will finish
        self._span = span
        self._sink = sink
        self._is_streamed = is_streamed
        self._on_end = on_end
        self._began_s = time.monotonic()
        self._has_started = False
        self._num_tokens = 0
        self._num_cached_tokens = 0
        self._finish_reasons: dict[int, str] = {}  # choice index -> why it ended

    def start(self) -> None:
        """The first step of a choice is planned. Later choices and later starts, after a preemption, do not count."""
        if not self._has_started:
            self._has_started = True
            self._note_time(telemetry.TIME_IN_QUEUE)

    def deliver(self, handle: int, delta: ChoiceDelta) -> None:
        if self._is_streamed and not self._num_tokens and delta.token_ids:
            self._note_time(telemetry.TIME_TO_FIRST_TOKEN)
        self._num_tokens += len(delta.token_ids)
        self._num_cached_tokens += delta.num_cached_tokens or 0
        if delta.finish_reason is not None:
            self._finish_reasons[delta.index] = delta.finish_reason.value
        if len(self._finish_reasons) == self._num_choices:
            self.end(is_aborted=False)
        self._sink.deliver(handle, delta)

    def fail(self, handle: int, error: TriviumError) -> None:
        self.end(is_aborted=False, error=error)
        self._sink.fail(handle, error)

    def end(self, *, is_aborted: bool, error: TriviumError | None = None) -> None:
        """Write what is known and end the span. Does nothing to one that has ended."""
        if not self._span.is_recording():
            return
        if error is not None:
            telemetry.record_error(self._span, error)
        reasons = [reason for _, reason in sorted(self._finish_reasons.items())]
        if is_aborted:
            reasons += [FinishReason.ABORT.value] * (self._num_choices - len(reasons))
        self._span.set_attribute(telemetry.USAGE_CACHED_TOKENS, self._num_cached_tokens)
        self._span.set_attribute(telemetry.USAGE_OUTPUT_TOKENS, self._num_tokens)
        self._span.set_attribute(telemetry.RESPONSE_FINISH_REASONS, reasons)
        self._span.set_attribute(telemetry.ABORTED, is_aborted)
        self._note_time(telemetry.E2E)
        self._span.end()
        self._on_end(self)

    def _note_time(self, name: str) -> None:
        self._span.set_attribute(name, time.monotonic() - self._began_s)


class TracedEngineLoop(EngineLoop):
    """An EngineLoop that makes a span of each request. Owner of the traces."""

    def __init__(
        self,
        executor: ExecutorClient,
        detokenizer: DetokenizerClient,
        config: SchedulerConfig,
        *,
        model: str,
        on_ready: Callable[[bool], None] = lambda ready: None,
    ) -> None:
        super().__init__(executor, detokenizer, config, on_ready=on_ready, on_start=self._on_start)
        self._model = model
        self._traces: dict[int, RequestTrace] = {}  # request key -> trace of the request that it is a choice of

    def submit(self, request: GenerationRequest, sink: DeltaSink, handle: int) -> tuple[int, ...]:
        span = telemetry.start_span(f"generate {self._model}", request.traceparent)
        if not span.is_recording():
            return super().submit(request, sink, handle)
        num_input_tokens = len(request.prompt.token_ids) + len(request.prompt.encoder_token_ids or ())
        span.set_attributes(telemetry.request_attributes(self._model, request.sampling))
        span.set_attribute(telemetry.REQUEST_ID, request.request_id)
        span.set_attribute(telemetry.USAGE_INPUT_TOKENS, num_input_tokens)
        trace = RequestTrace(
            span, sink, is_streamed=request.stream, num_choices=request.num_open_choices, on_end=self._forget
        )
        try:
            trace.keys = super().submit(request, trace, handle)
        except TriviumError as error:
            trace.end(is_aborted=False, error=error)
            raise
        if not trace.keys:  # all choices were complete when the request came
            trace.end(is_aborted=False)
        self._traces.update(dict.fromkeys(trace.keys, trace))
        return trace.keys

    def abort(self, keys: tuple[int, ...]) -> None:
        super().abort(keys)
        for trace in {self._traces[key] for key in keys if key in self._traces}:
            trace.end(is_aborted=True)

    def _on_start(self, request: Request) -> None:
        if request.key in self._traces:
            self._traces[request.key].start()

    def _forget(self, trace: RequestTrace) -> None:
        for key in trace.keys:
            self._traces.pop(key, None)
