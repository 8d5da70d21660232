"""Server-sent events: framing, batching and the end of a stream.

Pumps encode each delta into a buffer as it comes; one writer sends whatever the buffer holds whenever the connection
takes it. Deltas that arrive together leave in one write, and a slow client stops the pumps, not the server.

Order of side effects: nothing is sent before the first event exists, so that a failure until then is a proper HTTP
status. A later failure is one `{"error": ...}` event and the end of the body, without `[DONE]`: `[DONE]` proves that
a stream is complete. If the client is gone nothing is sent at all.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from starlette.types import Receive, Send

from trivium.outputs import ChoiceDelta
from trivium_gateway.asgi import watch_disconnect
from trivium_gateway.concurrency import run_all
from trivium_gateway.drain import Drain
from trivium_gateway.errors import ClientDisconnectedError, client_error, error_body
from trivium_gateway.generation import Generation, run_generation
from trivium_gateway.tracing import record_failure
from trivium_gateway.usage import TokenCounts, Usage

logger = logging.getLogger(__name__)

MAX_BUFFER_BYTES = 64 * 1024
DONE = b"data: [DONE]\n\n"

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ChunkEncoder(Protocol):
    """The form of one endpoint's events, framed and ready to be sent."""

    def chunk(self, choice: int, delta: ChoiceDelta) -> bytes:
        """The event that tells of `delta`; empty if there is nothing to tell."""
        ...

    def usage(self, usage: Usage) -> bytes:
        """The last event before `[DONE]`; empty if it was not asked for."""
        ...


class EventBuffer:
    """Encoded events between the pumps of one call, which add, and its writer, which takes.

    Bounded: `is_full` tells a pump to wait. Each pump may overshoot by one event.
    """

    def __init__(self, encoder: ChunkEncoder) -> None:
        self._encoder = encoder
        self._events: list[bytes] = []
        self._num_bytes = 0
        self._is_closed = False
        self._failure: Exception | None = None
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self.counts = TokenCounts()

    def add(self, choice: int, delta: ChoiceDelta) -> None:
        """Append the event of `delta`."""
        self.counts.add(delta)
        self._append(self._encoder.chunk(choice, delta))

    def is_full(self) -> bool:
        return self._num_bytes > MAX_BUFFER_BYTES

    async def wait_for_room(self) -> None:
        self._has_room.clear()
        await self._has_room.wait()

    def finish(self, usage: Usage) -> None:
        """Append the end of a complete stream. Nothing may be added after it."""
        self._append(self._encoder.usage(usage) + DONE)
        self._close(None)

    def fail(self, error: Exception) -> None:
        """End the stream: the writer raises `error` once it has taken what is in the buffer."""
        self._close(error)

    async def take(self) -> tuple[bytes, bool]:
        """Everything that was added since, and whether more may come. Raises the failure of a failed stream."""
        await self._has_news.wait()
        if not self._events and self._failure is not None:
            raise self._failure
        batch = b"".join(self._events)
        self._events.clear()
        self._num_bytes = 0
        self._has_room.set()
        if not self._is_closed:
            self._has_news.clear()
        return batch, not self._is_closed or self._failure is not None

    def _append(self, event: bytes) -> None:
        if event:
            self._events.append(event)
            self._num_bytes += len(event)
            self._has_news.set()

    def _close(self, failure: Exception | None) -> None:
        self._is_closed = True
        self._failure = failure
        self._has_news.set()


async def stream_generation(
    generation: Generation, encoder: ChunkEncoder, *, receive: Receive, send: Send, drain: Drain
) -> None:
    """Run `generation` and send its events. Raises only what went wrong before the first byte, or a lost client."""
    buffer = EventBuffer(encoder)
    await run_all([_produce(generation, buffer, receive, drain), _write(buffer, send, generation.id)])


async def _produce(generation: Generation, buffer: EventBuffer, receive: Receive, drain: Drain) -> None:
    try:
        await run_generation(generation, buffer, watch_disconnect(receive), drain.watch())
    except Exception as error:
        buffer.fail(error)
    else:
        buffer.finish(generation.usage(buffer.counts))


async def _write(buffer: EventBuffer, send: Send, generation_id: str) -> None:
    batch, has_more = await buffer.take()  # raises what becomes an HTTP status
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    try:
        while has_more:
            await send({"type": "http.response.body", "body": batch, "more_body": True})
            batch, has_more = await buffer.take()
    except ClientDisconnectedError:
        raise
    except Exception as error:
        shown = client_error(error)
        record_failure(error)
        logger.warning("%s: ended early: %s", generation_id, shown.code, exc_info=None if shown is error else error)
        batch = b"data: " + error_body(shown) + b"\n\n"
    await send({"type": "http.response.body", "body": batch})
