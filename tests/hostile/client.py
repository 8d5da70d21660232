"""Sends the rows of the table, and requests beside them whose texts must never change."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import openai

from hostile.row import BART, LLAMA, Call

WAIT_S = 60
LEAKS = re.compile(rb"0x[0-9a-f]{6,}|/home|/tmp|site-packages|Traceback|object at|\.py\b")
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}  # others: by class of status


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, read whole. is_closed: the connection was closed behind it."""

    status: int
    headers: Mapping[str, str]  # lower-case names
    body: bytes
    is_closed: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body, parse_constant=_refuse_constant)

    def error(self) -> tuple[int, str | None, str | None]:
        """(status, code, param), having checked the form of the body."""
        assert self.headers["content-type"] == "application/json" and self.headers["x-request-id"]
        assert not LEAKS.search(self.body), self.body
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"], error
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        assert error["type"] == kind, error
        return self.status, error["code"], error["param"]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def send(port: int, sent: Call | bytes, *, closes: bool = False) -> Answer:
    """The answer to `sent`, on a connection of its own. `closes`: wait for the server to close it."""
    if isinstance(sent, bytes):
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
            with suppress(ConnectionError):  # refused before all of it was read
                connection.sendall(sent)
            return _read(connection, until_closed=closes)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request(sent.method, sent.path, sent.body, dict(sent.headers))
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read(), headers.get("connection") == "close")
    finally:
        connection.close()


def _read(connection: socket.socket, *, until_closed: bool) -> Answer:
    data, length = b"", None
    while length is None or len(data) < length or until_closed:
        received = connection.recv(65536)
        if not received:
            break
        data += received
        head, separator, _ = data.partition(b"\r\n\r\n")
        found = re.search(rb"(?i)content-length: *(\d+)", head)
        length = len(head) + 4 + int(found[1]) if separator and found else None
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(first.split()[1]), headers, body, until_closed)


class Canary(threading.Thread):
    """Sends one well-formed request again and again. `texts` must stay one; `num_runs` counts."""

    def __init__(self, url: str, model: str, *, stream: bool, temperature: float) -> None:
        super().__init__(daemon=True, name=f"{model} stream={stream} temperature={temperature}")
        self._client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=WAIT_S)
        self._fields: dict[str, Any] = {
            "model": model,
            "prompt": f"the canary of {temperature}",
            "max_tokens": 24,
            "temperature": temperature,
            "seed": 5,
            "stream": stream,
            "extra_headers": {"X-Request-Id": "canary"},  # the same for all of them, at the same time
            "extra_body": {"ignore_eos": True},
        }
        self._is_over = threading.Event()
        self.texts: set[str] = set()
        self.num_runs = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self._is_over.is_set():
                self.texts.add(self._text())
                self.num_runs += 1
                time.sleep(0.02)  # a row shares two cores with eight of these
        except Exception as error:
            self.error = error
        finally:
            self._client.close()

    def stop(self) -> None:
        self._is_over.set()
        self.join(WAIT_S)

    def _text(self) -> str:
        answer: Any = self._client.completions.create(**self._fields)
        if not self._fields["stream"]:
            return str(answer.choices[0].text)
        return "".join(chunk.choices[0].text for chunk in answer)


def make_canaries(url: str) -> list[Canary]:
    return [
        Canary(url, model, stream=stream, temperature=temperature)
        for model in (LLAMA, BART)
        for stream in (False, True)
        for temperature in (0.0, 1.0)
    ]
