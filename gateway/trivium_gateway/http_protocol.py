"""HTTP/1.1 with limits: uvicorn's httptools protocol, plus bounds on the request head and our error bodies.

The parser itself refuses broken framing (two lengths, length and chunks together, unknown versions). Added here:
431 and 414 for heads over the limits, 408 for one that does not arrive, an OpenAI error body for everything refused
below the application, bounds on what is read and thrown away after an early answer and on the number of chunks, and the
news of a lost connection for *every* unanswered request.

One timer waits for whatever the client has to send next: the first byte, then the rest of a head, or after an early
answer the rest of a body. (Between two requests uvicorn waits, and the application for bodies that it wants to read.)
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from trivium.errors import InvalidRequestError
from trivium_gateway.errors import error_body
from trivium_gateway.front_door import new_request_id

MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 100
MAX_CHUNKS = 65_536  # of one body: each costs as much time as a kilobyte
HEAD_TIMEOUT_S = 10.0
MAX_DISCARDED_BYTES = 64 * 2**20  # read and thrown away after an early answer, so that the client gets to read it
DISCARD_TIMEOUT_S = 5.0
LINGER_S = 1.0  # how long a refused connection stays half open for the same reason


class _RefusedError(Exception):
    """Stops the parser; `refusal` says what the client is told."""


class _Refusal(InvalidRequestError):
    """An answer given below the application."""

    def __init__(self, message: str, *, status: HTTPStatus, code: str) -> None:
        super().__init__(message, code=code)
        self.status = status


class GatewayHttpProtocol(HttpToolsProtocol):
    """One client connection."""

    _refusal: _Refusal | None = None
    _is_refused = False  # the parser is not fed any more
    _num_steps = 0  # heads, pieces of bodies and ends of messages that the parser has seen
    _num_pending_bytes = 0  # read since the last step: an unfinished head or trailer, which the parser keeps
    _num_header_bytes = 0
    _num_chunks = 0
    _num_discarded_bytes = 0
    _is_head_due = True  # the next byte belongs to a head, or to empty lines before one
    _is_head_timed = False  # since the first of these bytes
    _is_head_begun = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unanswered: list[RequestResponseCycle] = []
        self._wait(self.timeout_keep_alive, self._end_without_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        for cycle in self._unanswered:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            self._discard(len(data))
            return
        if self.transport.is_closing():
            return
        num_steps = self._num_steps
        if self._is_head_due:
            self._time_head()
        super().data_received(data)
        if num_steps != self._num_steps:
            self._num_pending_bytes = 0  # what began in this read is counted from the next one on
            return
        self._num_pending_bytes += len(data)
        if self._num_pending_bytes > MAX_HEADER_BYTES + MAX_URL_BYTES and not self._is_refused:
            self._refusal = _headers_too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_header_bytes = 0
        self._num_chunks = 0
        self._num_discarded_bytes = 0
        self._is_head_begun = True
        self._time_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refusal = _Refusal(
                f"the request URL is longer than {MAX_URL_BYTES} bytes",
                status=HTTPStatus.REQUEST_URI_TOO_LONG,
                code="uri_too_long",
            )
            raise _RefusedError

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_header_bytes += len(name) + len(value)
        if self._num_header_bytes > MAX_HEADER_BYTES or len(self.headers) >= MAX_HEADERS:
            self._refusal = _headers_too_large()
            raise _RefusedError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_steps += 1
        self._is_head_due = False
        self._stop_waiting()
        super().on_headers_complete()
        self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        self._unanswered.append(self.cycle)

    def on_chunk_header(self) -> None:
        self._num_chunks += 1
        if self._num_chunks > MAX_CHUNKS:
            self._refusal = _Refusal(
                f"the request body comes in more than {MAX_CHUNKS} chunks",
                status=HTTPStatus.BAD_REQUEST,
                code="too_many_chunks",
            )
            raise _RefusedError

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._num_steps += 1
        self._is_head_due, self._is_head_timed, self._is_head_begun = True, False, False
        self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_head_due and self.cycle.response_complete:
            self._wait(DISCARD_TIMEOUT_S, self.transport.close)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._num_steps += 1
        if self.cycle.response_complete:
            self._discard(len(body))

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refused, then close. In the middle of a response nothing can be said: just close.

        The connection lingers for a moment: closing it with unread data would reset it, and a client that is still
        sending would never read the answer.
        """
        refusal = self._refusal or _malformed(sys.exc_info()[1])
        self._is_refused = True
        self._stop_waiting()
        is_response_begun = any(cycle.response_started and not cycle.response_complete for cycle in self._unanswered)
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        if is_response_begun:
            self.transport.close()
            return
        self.transport.write(_head_and_body(refusal))
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_head(self) -> None:
        if not self._is_head_timed:
            self._is_head_timed = True
            self._wait(HEAD_TIMEOUT_S, self._end_without_head)

    def _end_without_head(self) -> None:
        """A head has not arrived in time. Behind a response that still runs nobody is waiting for it."""
        if any(not cycle.response_complete for cycle in self._unanswered):
            self._wait(HEAD_TIMEOUT_S, self._end_without_head)
        elif self._is_head_begun:
            self._refusal = _Refusal(
                f"the request head did not arrive within {HEAD_TIMEOUT_S:g} s",
                status=HTTPStatus.REQUEST_TIMEOUT,
                code="request_timeout",
            )
            self.send_400_response("")
        else:
            self.transport.close()

    def _discard(self, num_bytes: int) -> None:
        self._num_discarded_bytes += num_bytes
        if self._num_discarded_bytes > MAX_DISCARDED_BYTES:
            self.transport.close()


def _headers_too_large() -> _Refusal:
    return _Refusal(
        f"the request headers exceed {MAX_HEADERS} fields or {MAX_HEADER_BYTES} bytes",
        status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        code="headers_too_large",
    )


def _malformed(error: BaseException | Any) -> _Refusal:
    if "Content-Length" in str(error):
        return _Refusal(
            "the Content-Length header is invalid", status=HTTPStatus.BAD_REQUEST, code="invalid_content_length"
        )
    return _Refusal("this is not a valid HTTP/1.1 request", status=HTTPStatus.BAD_REQUEST, code="invalid_http")


def _head_and_body(refusal: _Refusal) -> bytes:
    body = error_body(refusal)
    head = (
        f"HTTP/1.1 {refusal.status.value} {refusal.status.phrase}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        f"x-request-id: {new_request_id()}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
