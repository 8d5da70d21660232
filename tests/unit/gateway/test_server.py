"""The end of a server, a port that is taken, and `serve` as a whole."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from pathlib import Path
from typing import Any

import openai
import pytest

from trivium.config import GatewayConfig
from trivium.errors import ConfigurationError
from trivium.outputs import ChoiceDelta
from trivium_gateway.app import serve
from trivium_gateway.server import bind
from unit.gateway.fakes import WAIT_S, FakeEngine, Hang, RunningServer, deltas, make_info, post, request

PATH = "/v1/completions"


def open_stream(port: int, prompt: str) -> socket.socket:
    body = json.dumps({"model": "tiny", "prompt": prompt, "stream": True}).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    data = b""
    while received := connection.recv(65536):
        data += received
    return data


def test_idle_server_stops_at_once() -> None:
    server = RunningServer({"tiny": FakeEngine(make_info("tiny"))})
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        client.completions.create(model="tiny", prompt="a")  # leaves an idle connection open
        server.stop()


def test_draining_refuses_new_requests_and_cuts_the_old_at_the_limit() -> None:
    engine = FakeEngine(make_info("tiny"))
    engine.scripts["cut"] = [ChoiceDelta(0, (65,), "a"), Hang()]
    server = RunningServer({"tiny": engine}, drain_timeout_s=0.6)
    with open_stream(server.port, "cut") as stream:
        engine.started.get(timeout=WAIT_S)
        server.begin_stop()
        ready = wait_for_draining(server.port)
        assert ready == {"status": "draining"}
        assert request(server.port, "GET", "/health/live").status == 200
        refused = post(server.port, PATH, {"model": "tiny", "prompt": "a" * 2**20})
        assert refused.error == (503, "draining", None)
        assert refused.headers["retry-after"] == "1" and refused.headers["connection"] == "close"
        data = read_to_end(stream)
    assert b'"text":"a"' in data and b'"code":"server_shutdown"' in data and b"[DONE]" not in data
    assert engine.aborted.get(timeout=WAIT_S)
    server.join()


def wait_for_draining(port: int) -> object:
    while (answer := request(port, "GET", "/health/ready")).status == 200:
        pass
    return answer.json


def test_draining_lets_a_stream_finish() -> None:
    engine = SteppedEngine()
    server = RunningServer({"tiny": engine})
    with open_stream(server.port, "abc") as stream:
        engine.started.get(timeout=WAIT_S)
        server.begin_stop()
        wait_for_draining(server.port)
        engine.let_go()
        data = read_to_end(stream)
    assert b"[DONE]" in data and b"error" not in data
    server.join()


class SteppedEngine(FakeEngine):
    """Holds every request back until `let_go`."""

    def __init__(self) -> None:
        super().__init__(make_info("tiny"))
        self._gate = threading.Event()

    def let_go(self) -> None:
        self._gate.set()

    async def generate(self, request):  # type: ignore[no-untyped-def]
        self.started.put(request.request_id)
        await asyncio.to_thread(self._gate.wait, WAIT_S)
        for delta in deltas("a", "b"):
            yield delta


def test_taken_port_is_one_clear_line() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigurationError) as failure:
            bind("127.0.0.1", port)
    assert str(failure.value) == f"cannot listen on 127.0.0.1:{port}: the port is already in use"


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_foreign_address_is_one_clear_line(host: str) -> None:
    with pytest.raises(ConfigurationError, match="not an address of this machine"):
        bind(host, 0)


@pytest.mark.asyncio
async def test_serve_needs_no_engine_to_start_and_stops_when_told(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    stop = asyncio.Event()
    serving = asyncio.create_task(
        serve(
            models={"tiny": f"unix:{tmp_path}/scheduler"},
            tokenizer=f"unix:{tmp_path}/tokenizer",
            host="127.0.0.1",
            port=port,
            config=GatewayConfig(),
            stop=stop,
        )
    )
    await asyncio.sleep(0)
    assert (await asyncio.to_thread(request, port, "GET", "/health/live")).status == 200
    ready = await asyncio.to_thread(request, port, "GET", "/health/ready")
    assert (ready.status, ready.json["waiting_for"]) == (503, ["tiny"])
    answer = await asyncio.to_thread(post, port, PATH, {"model": "tiny", "prompt": "a"})
    assert answer.status == 503 and answer.headers["retry-after"]
    stop.set()
    async with asyncio.timeout(WAIT_S):
        await serving


@pytest.mark.asyncio
async def test_serve_refuses_a_taken_port() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigurationError, match="in use"):
            await serve(
                models={}, tokenizer="", host="127.0.0.1", port=port, config=GatewayConfig(), stop=asyncio.Event()
            )


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"api_key": ""}, "empty"), ({"api_key": " "}, "empty"), ({"max_requests_per_minute": -1}, "negative")],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        GatewayConfig(**settings)


def test_the_key_is_in_no_text_of_the_settings() -> None:
    assert "s3cret" not in repr(GatewayConfig(api_key="s3cret"))
