"""Spans on their way out of real processes, into a collector that speaks OTLP."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import openai
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from cluster import Cluster, environment
from cluster import serve as serve_cluster
from tiny import save_tiny

pytestmark = pytest.mark.xdist_group("recovery")

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent: (service name, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []

    async def Export(self, request: trace_service_pb2.ExportTraceServiceRequest, context: object) -> object:
        for group in request.resource_spans:
            (name,) = (item.value.string_value for item in group.resource.attributes if item.key == "service.name")
            self.spans.extend((name, span) for scope in group.scope_spans for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


def ask(cluster: Cluster) -> None:
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
        client.completions.create(model="llama", prompt="hello", max_tokens=4, extra_headers=headers)


@pytest.mark.asyncio
async def test_a_request_is_one_trace_through_both_services_and_the_end_flushes_it(tmp_path: Path) -> None:
    checkpoint = save_tiny("llama", tmp_path / "llama", with_tokenizer=True)
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    env = environment(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}", OTEL_BSP_SCHEDULE_DELAY="600000")

    def ask_once() -> None:
        with serve_cluster(f"llama={checkpoint}", log=tmp_path / "serve.log", env=env) as cluster:
            ask(cluster)
            assert collector.spans == [], "nothing leaves before the end with this delay"

    try:
        await asyncio.to_thread(ask_once)
    finally:
        await server.stop(1)
    spans = {name: span for name, span in collector.spans}
    assert spans.keys() == {"trivium-gateway", "trivium-scheduler"} and len(collector.spans) == 2
    gateway, scheduler = spans["trivium-gateway"], spans["trivium-scheduler"]
    assert (gateway.name, scheduler.name) == ("text_completion llama", "generate llama")
    assert (gateway.parent_span_id.hex(), scheduler.parent_span_id) == (SPAN_ID, gateway.span_id)
    assert gateway.trace_id.hex() == scheduler.trace_id.hex() == TRACE_ID
    tokens = {item.key: item.value.int_value for item in scheduler.attributes if item.key.startswith("gen_ai.usage")}
    assert tokens["gen_ai.usage.output_tokens"] == 4
    assert gateway.start_time_unix_nano <= scheduler.start_time_unix_nano
