"""Limits and framing below the application, seen from a raw socket. What is refused at once: tests/hostile."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from unit.gateway.fakes import WAIT_S, FakeEngine, Hang, Pause, RunningServer, World, deltas, make_info, request

BODY = b'{"model":"tiny","prompt":"a"}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    data = b""
    while received := connection.recv(65536):
        data += received
    return data


def read_response(connection: socket.socket) -> bytes:
    """One response with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        received = connection.recv(65536)
        assert received, data
        data += received
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def status_and_code(response: bytes) -> tuple[int, str]:
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"x-request-id:" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def ask(port: int, data: bytes) -> tuple[int, str]:
    with connect(port) as connection:
        connection.sendall(data)
        return status_and_code(read_response(connection))


def with_length(length: bytes) -> bytes:
    return HEAD + b"Content-Length: " + length + b"\r\n\r\n"


@pytest.mark.parametrize("host", [b"localhost", b"127.0.0.1:8000", b"[::1]:8000", b"a-b.c_d.example"])
def test_good_host_passes(world: World, host: bytes) -> None:
    with connect(world.port) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        assert read_response(connection).startswith(b"HTTP/1.1 200")


def test_large_length_is_413_before_the_body_is_sent(world: World) -> None:
    assert ask(world.port, with_length(b"8388609")) == (413, "content_too_large")


def test_client_that_sends_the_large_body_first_still_reads_the_413(world: World) -> None:
    answer = request(world.port, "POST", "/v1/completions", b" " * (9 * 2**20), {"Content-Type": "application/json"})
    assert answer.error == (413, "content_too_large", None)


def test_body_of_exactly_the_limit_is_read(world: World) -> None:
    body = BODY + b" " * (8 * 2**20 - len(BODY))
    answer = request(world.port, "POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert answer.status == 200


@pytest.mark.parametrize("num_bytes", [1000, 70_000, 100_000, 200_000])
def test_head_and_large_body_in_one_piece_are_one_request(world: World, num_bytes: int) -> None:
    body = BODY + b" " * num_bytes
    data = with_length(str(len(body)).encode()) + body
    with connect(world.port) as connection:
        for _ in range(3):
            connection.sendall(data)
            assert read_response(connection).startswith(b"HTTP/1.1 200")


def test_many_one_byte_chunks_are_one_body(world: World) -> None:
    with connect(world.port) as connection:
        connection.sendall(CHUNKED + b"1\r\nx\r\n" * 65_535 + b"0\r\n\r\n")
        assert status_and_code(read_response(connection)) == (400, "invalid_json")


def test_too_many_chunks_are_refused(world: World) -> None:
    with connect(world.port) as connection:
        connection.sendall(CHUNKED + b"1\r\nx\r\n" * 65_537)
        assert status_and_code(read_all(connection)) == (400, "too_many_chunks")


def test_endless_body_after_an_answer_is_cut(world: World) -> None:
    with connect(world.port) as connection:
        connection.sendall(with_length(b"1000000000000"))
        assert status_and_code(read_response(connection)) == (413, "content_too_large")
        with pytest.raises(OSError, match=r"reset|pipe"):
            for _ in range(1000):
                connection.sendall(b" " * 2**20)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """A server that waits for no client."""
    monkeypatch.setattr("trivium_gateway.http_protocol.HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr("trivium_gateway.http_protocol.DISCARD_TIMEOUT_S", 0.3)
    monkeypatch.setattr("trivium_gateway.server.KEEP_ALIVE_S", 0.3)
    engine = FakeEngine(make_info("tiny"))
    engine.scripts["slow"] = [Pause(1.0), *deltas("1", "2")]
    server = RunningServer({"tiny": engine})
    yield server
    server.stop()


def drip(connection: socket.socket, data: bytes) -> bytes:
    """Send `data` byte by byte, with pauses far shorter than any limit, until the server closes; what it said."""
    connection.settimeout(0.05)
    answer = b""
    with suppress(ConnectionError):
        for byte in data:
            connection.sendall(bytes([byte]))
            with suppress(TimeoutError):
                received = connection.recv(65536)
                if not received:
                    return answer
                answer += received
    return answer


def test_a_head_that_comes_byte_by_byte_is_408(hasty: RunningServer) -> None:
    with connect(hasty.port) as connection:
        assert status_and_code(drip(connection, HEAD * 10)) == (408, "request_timeout")


@pytest.mark.parametrize("data", [b"", b"\r\n" * 200], ids=["nothing", "empty lines"])
def test_a_connection_that_begins_no_request_is_closed_without_a_word(hasty: RunningServer, data: bytes) -> None:
    with connect(hasty.port) as connection:
        assert (drip(connection, data) if data else read_all(connection)) == b""


def test_half_a_head_behind_a_running_response_does_not_end_it(hasty: RunningServer) -> None:
    body = b'{"model":"tiny","prompt":"slow"}'
    with connect(hasty.port) as connection:
        connection.sendall(with_length(str(len(body)).encode()) + body + b"GET / HT")
        answers = read_all(connection)
    first, _, second = answers.partition(b"HTTP/1.1 408")
    assert b'"text":"12"' in first and b"request_timeout" in second


def test_a_body_that_trickles_in_after_its_answer_is_cut(hasty: RunningServer) -> None:
    with connect(hasty.port) as connection:
        connection.sendall(with_length(b"8388609"))
        assert status_and_code(drip(connection, b" " * 200)) == (413, "content_too_large")


def test_expect_continue_is_honoured(world: World) -> None:
    with connect(world.port) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 29\r\n\r\n")
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert read_response(connection).startswith(b"HTTP/1.1 200")


def test_garbage_behind_a_running_request_aborts_it(world: World) -> None:
    world.tiny.scripts["behind"] = [Hang()]
    body = b'{"model":"tiny","prompt":"behind"}'
    with connect(world.port) as connection:
        connection.sendall(with_length(str(len(body)).encode()) + body)
        request_id = world.tiny.started.get(timeout=WAIT_S)
        connection.sendall(b"\0\xff\r\n\r\n")
        assert status_and_code(read_all(connection)) == (400, "invalid_http")
    assert world.tiny.aborted.get(timeout=WAIT_S) == request_id
