"""Spans of gateway and scheduler, joined over a real session; and that none of it exists until it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id
from starlette.types import ASGIApp, Message

import trivium
from toy import ToyDetokenizerClient, ToyExecutorClient, make_info
from trivium import rpc, telemetry
from trivium.config import SchedulerConfig
from trivium.errors import ConfigurationError, EngineUnavailableError
from trivium.remote_engine import RemoteEngine
from trivium.scheduler.request_trace import TracedEngineLoop
from trivium.scheduler.server import SERVICE, SchedulerServicer
from trivium.step import ModelRunnerOutput
from trivium.tokenizer_client import TokenizerClient
from trivium.v1 import scheduler_pb2, scheduler_pb2_grpc, types_pb2
from trivium_gateway.app import create_app
from trivium_gateway.routing import ModelRoutes
from unit.gateway import fakes

ROOTS = os.pathsep.join(str(Path(trivium.__file__).parents[2] / name) for name in ("services", "kernels", "gateway"))
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
COMPLETION = {"model": "toy", "prompt": [5, 6, 7], "max_tokens": 6, "seed": 3, "ignore_eos": True}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Where the spans of this test go. A global provider could not be taken away from the tests that follow."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_TRACER", provider.get_tracer("unit"))
    return exporter


class PausingExecutor(ToyExecutorClient):
    """Gives no results while `go` is clear."""

    def __init__(self, **info: object) -> None:
        super().__init__(make_info(**info))
        self.go = asyncio.Event()
        self.go.set()

    async def next_result(self) -> ModelRunnerOutput:
        await self.go.wait()
        return await super().next_result()


class Call:
    """One POST to an ASGI application; the client leaves when `leave` is set."""

    def __init__(self, app: ASGIApp, path: str, body: object, headers: dict[str, str]) -> None:
        self.status = 0
        self.body = b""
        self.leave = asyncio.Event()
        self.has_body = asyncio.Event()
        self._bodies = [json.dumps(body).encode()]
        head = {"host": "test", "content-type": "application/json", **headers}
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": path, "root_path": "", "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in head.items()],
        }  # fmt: skip
        self.done = asyncio.create_task(app(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> Message:
        if self._bodies:
            return {"type": "http.request", "body": self._bodies.pop(), "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")
        if self.body:
            self.has_body.set()


class World:
    """A gateway application, a scheduler server and a session between them."""

    def __init__(self, app: ASGIApp, address: str, executor: PausingExecutor) -> None:
        self.app = app
        self.address = address
        self.executor = executor

    async def post(self, path: str = "/v1/completions", headers: dict[str, str] | None = None, **changes: Any) -> Call:
        call = Call(self.app, path, COMPLETION | changes, headers or {})
        await asyncio.wait_for(call.done, 10)
        return call


@contextlib.asynccontextmanager
async def running(tmp_path: Path, max_waiting_requests: int = 50, **info: object) -> AsyncIterator[World]:
    address, executor = f"unix:{tmp_path}/s", PausingExecutor(**info)
    config = SchedulerConfig(max_waiting_requests=max_waiting_requests)
    loop = TracedEngineLoop(executor, ToyDetokenizerClient(), config, model="toy")
    async with rpc.open_channel(f"unix:{tmp_path}/nobody") as channel:
        server = rpc.Server(address, (SERVICE,))
        servicer = SchedulerServicer("toy", loop, TokenizerClient("toy", channel), rpc.new_epoch())
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(servicer, server.grpc_server)
        await server.start()
        task = asyncio.create_task(loop.run())
        engine = RemoteEngine(name="toy", scheduler_address=address, tokenizer_address=f"unix:{tmp_path}/nobody")
        await engine.start()
        try:
            while not await has_session(engine):
                await asyncio.sleep(0.01)
            yield World(create_app(ModelRoutes({"toy": engine})), address, executor)
        finally:
            await engine.close()
            servicer.drain()
            await server.stop(0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def has_session(engine: RemoteEngine) -> bool:
    try:
        return bool(engine.model_info)
    except EngineUnavailableError:
        return False


async def finished(exporter: InMemorySpanExporter, count: int) -> dict[str, list[ReadableSpan]]:
    """Spans by name, once there are `count`."""
    async with asyncio.timeout(5):
        while len(exporter.get_finished_spans()) < count:
            await asyncio.sleep(0.01)
    found: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def id_of(span: ReadableSpan) -> str:
    return format_span_id(span.context.span_id)


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else format_span_id(span.parent.span_id)


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.asyncio
async def test_the_client_is_the_parent_of_the_gateway_and_the_gateway_of_each_prompt(
    tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    async with running(tmp_path) as world:
        call = await world.post(headers={"traceparent": TRACEPARENT}, prompt=[[5, 6, 7], [8]])
    assert call.status == 200
    spans = await finished(exporter, 3)
    (gateway,), schedulers = spans["text_completion toy"], spans["generate toy"]
    assert parent_of(gateway) == SPAN_ID
    assert [parent_of(span) for span in schedulers] == [id_of(gateway)] * 2
    assert {format_trace_id(span.context.trace_id) for span in (gateway, *schedulers)} == {TRACE_ID}
    assert {span.kind for span in (gateway, *schedulers)} == {SpanKind.SERVER}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "header", ["garbage", f"00-{'0' * 32}-{SPAN_ID}-01", f"ff-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}"]
)
async def test_a_malformed_traceparent_begins_a_new_trace(
    tmp_path: Path, exporter: InMemorySpanExporter, header: str
) -> None:
    async with running(tmp_path) as world:
        assert (await world.post(headers={"traceparent": header})).status == 200
    spans = await finished(exporter, 2)
    (gateway,), (scheduler,) = spans["text_completion toy"], spans["generate toy"]
    assert parent_of(gateway) is None and format_trace_id(gateway.context.trace_id) != TRACE_ID
    assert parent_of(scheduler) == id_of(gateway)


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_says_what_was_asked_and_what_came(
    tmp_path: Path, exporter: InMemorySpanExporter, stream: bool
) -> None:
    async with running(tmp_path) as world:
        sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7}
        call = await world.post(headers={"x-request-id": "mine"}, stream=stream, n=2, **sampling)
    spans = await finished(exporter, 2)
    asked = {
        "gen_ai.request.model": "toy",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 3,
    }
    came = {
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 12,
    }
    gateway, scheduler = (attributes_of(*spans[name]) for name in ("text_completion toy", "generate toy"))
    assert gateway.pop("gen_ai.response.id").encode() in call.body
    assert gateway == asked | came | {"gen_ai.operation.name": "text_completion", "gen_ai.request.id": "mine"}
    times = {name: scheduler.pop(name) for name in list(scheduler) if name.startswith("gen_ai.latency.")}
    assert scheduler.pop("gen_ai.request.id").startswith("cmpl-")
    assert scheduler == asked | came | {"trivium.aborted": False}
    in_queue, end = times["gen_ai.latency.time_in_queue"], times["gen_ai.latency.e2e"]
    assert 0 <= in_queue < times.get("gen_ai.latency.time_to_first_token", end) <= end
    assert ("gen_ai.latency.time_to_first_token" in times) == stream, "whole answers have no first token"


@pytest.mark.asyncio
async def test_both_spans_say_how_much_of_the_prompts_was_cached(
    tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    prompts = [list(range(2, 28)), list(range(30, 39))]  # 6 and 2 blocks of 4, and a token
    async with running(tmp_path) as world:
        for prompt in (prompts[0], prompts):
            assert (await world.post(prompt=prompt, n=2)).status == 200
    spans = await finished(exporter, 5)
    name = "gen_ai.usage.cache_read.input_tokens"
    assert [attributes_of(span)[name] for span in spans["text_completion toy"]] == [0, 24]
    assert sorted(attributes_of(span)[name] for span in spans["generate toy"]) == [0, 0, 24]


@pytest.mark.asyncio
async def test_chat_is_named_after_its_model(exporter: InMemorySpanExporter) -> None:
    engine = fakes.FakeEngine(fakes.make_info("tiny"))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    call = Call(create_app(ModelRoutes({"tiny": engine})), "/v1/chat/completions", body, {"traceparent": TRACEPARENT})
    await call.done
    (span,) = (await finished(exporter, 1))["chat tiny"]
    assert attributes_of(span)["gen_ai.operation.name"] == "chat"
    assert engine.requests[0].traceparent == f"00-{TRACE_ID}-{id_of(span)}-01"


@pytest.mark.asyncio
async def test_a_client_that_does_not_sample_is_obeyed_and_its_context_travels_on(
    exporter: InMemorySpanExporter,
) -> None:
    engine = fakes.FakeEngine(fakes.make_info("tiny"))
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"}
    call = Call(create_app(ModelRoutes({"tiny": engine})), "/v1/completions", {"model": "tiny", "prompt": "a"}, headers)
    await call.done
    assert call.status == 200 and exporter.get_finished_spans() == ()
    assert engine.requests[0].traceparent.startswith(f"00-{TRACE_ID}-") and engine.requests[0].traceparent[-2:] == "00"


@pytest.mark.asyncio
async def test_a_clients_mistake_is_named_and_is_no_error_of_the_server(
    tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    async with running(tmp_path) as world:
        assert (await world.post(model="x" * 5000)).status == 404
    (span,) = (await finished(exporter, 1))["text_completion"]
    assert attributes_of(span) == {"gen_ai.operation.name": "text_completion", "error.type": "model_not_found"}
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.asyncio
async def test_a_failure_after_the_first_event_is_an_error(exporter: InMemorySpanExporter) -> None:
    engine = fakes.FakeEngine(fakes.make_info("tiny"))
    first, *_ = fakes.deltas("Hel", "lo")
    engine.scripts["break"] = [first, EngineUnavailableError("the engine is gone", code="gone")]
    body = {"model": "tiny", "prompt": "break", "stream": True}
    call = Call(create_app(ModelRoutes({"tiny": engine})), "/v1/completions", body, {})
    await call.done
    (span,) = (await finished(exporter, 1))["text_completion tiny"]
    assert span.status.status_code is StatusCode.ERROR and span.status.description == "the engine is gone"
    attributes = attributes_of(span)
    assert (attributes["error.type"], attributes["gen_ai.usage.output_tokens"]) == ("gone", 1)


@pytest.mark.asyncio
async def test_a_refused_request_has_a_span_in_both_services(tmp_path: Path, exporter: InMemorySpanExporter) -> None:
    async with running(tmp_path, max_waiting_requests=1) as world:
        assert (await world.post(n=2)).status == 429
    spans = await finished(exporter, 2)
    for span in (*spans["text_completion toy"], *spans["generate toy"]):
        assert attributes_of(span)["error.type"] == "queue_full"
    assert attributes_of(*spans["generate toy"])["trivium.aborted"] is False


@pytest.mark.asyncio
async def test_a_client_that_leaves_aborts_both_spans(tmp_path: Path, exporter: InMemorySpanExporter) -> None:
    async with running(tmp_path) as world:
        world.executor.on_plan = lambda plan: world.executor.go.clear() if len(world.executor.plans) == 4 else None
        call = Call(world.app, "/v1/completions", COMPLETION | {"stream": True, "max_tokens": 50, "n": 2}, {})
        await asyncio.wait_for(call.has_body.wait(), 5)
        call.leave.set()
        await asyncio.wait_for(call.done, 5)
        spans = await finished(exporter, 2)
    (gateway,), (scheduler,) = spans["text_completion toy"], spans["generate toy"]
    assert attributes_of(gateway)["trivium.aborted"] is True and attributes_of(scheduler)["trivium.aborted"] is True
    assert attributes_of(scheduler)["gen_ai.response.finish_reasons"] == ("abort", "abort")
    assert 0 < attributes_of(scheduler)["gen_ai.usage.output_tokens"] < 50
    assert {span.status.status_code for span in (gateway, scheduler)} == {StatusCode.UNSET}


@pytest.mark.asyncio
async def test_time_in_queue_ends_with_the_first_step(tmp_path: Path, exporter: InMemorySpanExporter) -> None:
    async with running(tmp_path, max_num_seqs=1) as world:
        world.executor.go.clear()
        calls = [asyncio.create_task(world.post(stream=True)) for _ in range(2)]
        await asyncio.sleep(0.2)
        world.executor.go.set()
        await asyncio.gather(*calls)
        spans = (await finished(exporter, 4))["generate toy"]
    waits = sorted(attributes_of(span)["gen_ai.latency.time_in_queue"] for span in spans)
    assert waits[0] < 0.1 < 0.15 < waits[1], "the one slot was taken until the results came"


@pytest.mark.asyncio
async def test_a_direct_stub_is_the_parent_of_its_request(tmp_path: Path, exporter: InMemorySpanExporter) -> None:
    request = scheduler_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(single=types_pb2.SingletonPrompt(tokens=types_pb2.TokensPrompt(ids=[5, 6, 7]))),
        sampling=types_pb2.SamplingParams(max_tokens=4, ignore_eos=True),
        traceparent=TRACEPARENT,
    )
    async with running(tmp_path) as world, rpc.open_channel(world.address) as channel:
        async for _ in scheduler_pb2_grpc.SchedulerStub(channel).Generate(request):
            pass
        (span,) = (await finished(exporter, 1))["generate toy"]
    assert parent_of(span) == SPAN_ID
    assert attributes_of(span)["trivium.aborted"] is False


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-P", "-c", code]
    env = {**outer, "PYTHONPATH": ROOTS, **environ}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


RUN_SERVICE = f"""
import sys, time
from opentelemetry import trace
from trivium import telemetry
from trivium.process import end_process, run_service

times = []
async def serve(stop):
    with trace.use_span(telemetry.start_span("unit", "{TRACEPARENT}"), end_on_exit=True):
        print(telemetry.current_traceparent())
    times.append(time.monotonic())

preload = ("trivium_gateway.app", "trivium.scheduler.server")
code = run_service("unit model", serve, preload=preload, is_traced=True)
print(any(name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")) for name in sys.modules))
print(time.monotonic() - times[0])
end_process(code)
"""


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_an_endpoint_no_sdk_is_imported_and_context_travels_on(environ: dict[str, str]) -> None:
    result = run_python(RUN_SERVICE, **environ)
    assert (result.stdout.split()[:2], result.stderr, result.returncode) == ([TRACEPARENT, "False"], "", 0)


def test_a_protocol_other_than_grpc_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(ConfigurationError, match="must be grpc, got 'http/protobuf'"):
        telemetry.setup_tracing("unit")


def test_a_collector_that_never_answers_does_not_hold_up_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        result = run_python(RUN_SERVICE, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert result.returncode == 0, result.stderr
    assert 0.5 <= float(result.stdout.split()[2]) < 2
    assert "the last spans were not delivered within 0.5 s" in result.stderr


@pytest.mark.parametrize(
    ("environ", "name"),
    [({}, "trivium-unit"), ({"OTEL_SERVICE_NAME": "a"}, "a"), ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=b"}, "b")],
)
def test_a_service_has_its_own_name_unless_the_environment_names_it(environ: dict[str, str], name: str) -> None:
    result = run_python(RUN_SERVICE, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", **environ)
    assert result.returncode == 0
    assert f"spans go to the OTLP endpoint as {name}\n" in result.stderr
