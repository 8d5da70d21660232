"""The span of one API call: `chat MODEL` or `text_completion MODEL`, below the client's own span if it names one.

The span is the current one while the call runs, so that whoever learns something of the call can note it. Where
nothing is recorded, deltas go their way unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry.trace import Span, get_current_span, use_span
from starlette.types import Scope

from trivium import telemetry
from trivium.outputs import ChoiceDelta
from trivium_gateway.asgi import header
from trivium_gateway.errors import ClientDisconnectedError, client_error
from trivium_gateway.usage import TokenCounts

if TYPE_CHECKING:
    from trivium_gateway.generation import DeltaSink, Generation


@contextmanager
def call_span(operation: str, scope: Scope) -> Iterator[Span]:
    """A span around one call that ends with it. It has the model in its name once `describe_call` was called."""
    span = telemetry.start_span(operation, header(scope, b"traceparent") or "")
    span.set_attribute(telemetry.OPERATION_NAME, operation)
    with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield span
        except ClientDisconnectedError:
            span.set_attribute(telemetry.ABORTED, True)
            raise
        except Exception as error:
            record_failure(error)
            raise


def describe_call(span: Span, operation: str, generation: Generation, request_id: str) -> None:
    """Note what was asked for: known once the request was read and its model found."""
    if span.is_recording():
        span.update_name(f"{operation} {generation.model}")
        span.set_attributes(telemetry.request_attributes(generation.model, generation.requests[0].sampling))
        span.set_attribute(telemetry.REQUEST_ID, request_id)
        span.set_attribute(telemetry.RESPONSE_ID, generation.id)


def record_failure(error: Exception) -> None:
    """Note on the current span what the client is told of `error`."""
    telemetry.record_error(get_current_span(), client_error(error))


@contextmanager
def recorded_deltas(generation: Generation, sink: DeltaSink) -> Iterator[DeltaSink]:
    """`sink`, watched if the current span is recorded: usage and finish reasons are noted however the call ends."""
    span = get_current_span()
    if not span.is_recording():
        yield sink
        return
    watched = _WatchedSink(sink)
    try:
        yield watched
    finally:
        usage = generation.usage(watched.counts)
        reasons = [reason for _, reason in sorted(watched.finish_reasons.items())]
        span.set_attribute(telemetry.USAGE_INPUT_TOKENS, usage.prompt_tokens)
        span.set_attribute(telemetry.USAGE_CACHED_TOKENS, usage.prompt_tokens_details.cached_tokens)
        span.set_attribute(telemetry.USAGE_OUTPUT_TOKENS, usage.completion_tokens)
        span.set_attribute(telemetry.RESPONSE_FINISH_REASONS, reasons)


class _WatchedSink:
    """A DeltaSink that counts what it passes on."""

    def __init__(self, sink: DeltaSink) -> None:
        self._sink = sink
        self.counts = TokenCounts()
        self.finish_reasons: dict[int, str] = {}  # choice -> why it ended

    def add(self, choice: int, delta: ChoiceDelta) -> None:
        self.counts.add(delta)
        if delta.finish_reason is not None:
            self.finish_reasons[choice] = delta.finish_reason.value
        self._sink.add(choice, delta)

    def is_full(self) -> bool:
        return self._sink.is_full()

    async def wait_for_room(self) -> None:
        await self._sink.wait_for_room()
