"""Tracing: set up from the standard OTEL_* environment, the names that spans use, and trace context as text.

Without an OTLP endpoint in the environment nothing but the OpenTelemetry API is imported: its spans record nothing, and
trace context that a client sent still travels on. Context goes from process to process in
`GenerationRequest.traceparent`, never in call metadata.

The GenAI conventions of OpenTelemetry are still in development, so their names are spelled out here.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from trivium import __version__
from trivium.errors import ConfigurationError, TriviumError
from trivium.params import SamplingParams

logger = logging.getLogger(__name__)

OPERATION_NAME = "gen_ai.operation.name"
REQUEST_ID = "gen_ai.request.id"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_CHOICE_COUNT = "gen_ai.request.choice.count"
REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE = "gen_ai.request.temperature"
REQUEST_TOP_P = "gen_ai.request.top_p"
REQUEST_TOP_K = "gen_ai.request.top_k"
REQUEST_SEED = "gen_ai.request.seed"
RESPONSE_ID = "gen_ai.response.id"
RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
USAGE_CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"  # part of the input tokens
USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
TIME_IN_QUEUE = "gen_ai.latency.time_in_queue"  # seconds, as all latencies
TIME_TO_FIRST_TOKEN = "gen_ai.latency.time_to_first_token"
E2E = "gen_ai.latency.e2e"
ERROR_TYPE = "error.type"
ABORTED = "trivium.aborted"  # the client left before the end

FLUSH_S = 0.5  # how long the end of a process waits for a collector; the supervisor gives a process 1.2 s in all

_PROPAGATOR = TraceContextTextMapPropagator()
_TRACER = trace.get_tracer("trivium", __version__)  # does nothing until a provider is installed


def setup_tracing(service: str) -> None:
    """Send the spans of this process to the OTLP endpoint that the environment names, as `trivium-<service>`.

    Does nothing if there is none. Raises ConfigurationError for a protocol other than gRPC.
    """
    if not _is_wanted(os.environ):
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    given = OTELResourceDetector().detect().attributes  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    resource = Resource.create({SERVICE_NAME: f"trivium-{service}", **given})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    logger.info("spans go to the OTLP endpoint as %s", resource.attributes[SERVICE_NAME])


def shutdown_tracing() -> None:
    """Send what is left, for at most FLUSH_S: a collector that does not answer must not hold up the end."""
    shutdown = getattr(trace.get_tracer_provider(), "shutdown", None)  # the provider of the API has none
    if shutdown is None:
        return
    thread = threading.Thread(target=shutdown, name="trace-flush", daemon=True)
    thread.start()
    thread.join(FLUSH_S)
    if thread.is_alive():
        logger.warning("the last spans were not delivered within %.1f s", FLUSH_S)


def start_span(name: str, traceparent: str) -> Span:
    """A server span below the one that `traceparent` names; below none if it is empty or malformed."""
    context = _PROPAGATOR.extract({"traceparent": traceparent}) if traceparent else Context()
    return _TRACER.start_span(name, context, kind=SpanKind.SERVER)


def current_traceparent() -> str:
    """The current span as W3C trace context; empty if there is none."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", "")


def request_attributes(model: str, sampling: SamplingParams) -> dict[str, AttributeValue]:
    """What was asked for. Unset parameters are left out."""
    values: dict[str, AttributeValue | None] = {
        REQUEST_MODEL: model,
        REQUEST_CHOICE_COUNT: sampling.n,
        REQUEST_MAX_TOKENS: sampling.max_tokens,
        REQUEST_TEMPERATURE: sampling.temperature,
        REQUEST_TOP_P: sampling.top_p,
        REQUEST_TOP_K: sampling.top_k,
        REQUEST_SEED: sampling.seed,
    }
    return {name: value for name, value in values.items() if value is not None}


def record_error(span: Span, error: TriviumError) -> None:
    """Note `error` on `span`. Only what is our fault makes the span an error; its message is safe to show."""
    span.set_attribute(ERROR_TYPE, error.code)
    if error.http_status >= 500:
        span.set_status(StatusCode.ERROR, error.message)


def _is_wanted(environ: Mapping[str, str]) -> bool:
    def setting(name: str) -> str:
        return environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""

    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    if is_off or not setting("ENDPOINT"):
        return False
    if setting("PROTOCOL") not in ("", "grpc"):
        raise ConfigurationError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be grpc, got {setting('PROTOCOL')!r}")
    return True
