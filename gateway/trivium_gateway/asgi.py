"""The few things this gateway needs of ASGI: read a body within limits, notice that the client left, send JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from starlette.types import Receive, Scope, Send

from trivium.errors import InvalidRequestError
from trivium_gateway.errors import (
    ClientDisconnectedError,
    ContentTooLargeError,
    Header,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)

MAX_BODY_BYTES = 8 * 2**20
MAX_EMBEDS_BODY_BYTES = 64 * 2**20  # where prompt embeddings may come
BODY_TIMEOUT_S = 60.0
DISCARD_TIMEOUT_S = 1.0

_JSON = (b"content-type", b"application/json")
_UTF8_NAMES = frozenset({"utf-8", "utf8", "us-ascii"})


def header(scope: Scope, name: bytes) -> str | None:
    """The first header called `name` (lower case), or None."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


def check_media_type(scope: Scope) -> None:
    """Raise unless the body is declared as plain JSON in UTF-8; no declaration at all counts as that."""
    media_type, *parameters = (part.strip().lower() for part in (header(scope, b"content-type") or "").split(";"))
    is_json = media_type == "application/json" or (media_type.startswith("application/") and media_type[-5:] == "+json")
    if media_type and not is_json:
        raise UnsupportedMediaTypeError(f"the content type must be application/json, not {media_type[:80]!r}")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "charset" and value.strip('"') not in _UTF8_NAMES:
            raise InvalidRequestError("the request body must be UTF-8", code="invalid_encoding")
    if (header(scope, b"content-encoding") or "identity").strip().lower() != "identity":
        raise UnsupportedMediaTypeError("compressed request bodies are not supported", code="unsupported_encoding")


async def read_body(scope: Scope, receive: Receive, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The whole body. Raises ContentTooLargeError, by Content-Length before anything is read of it.

    Memory stays bounded by `max_bytes` plus one chunk, whatever the client sends.
    """
    length = header(scope, b"content-length")
    if length is not None and int(length) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnectedError
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise RequestTimeoutError(f"the request body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None


async def discard_body(receive: Receive) -> None:
    """Read and throw away a body of ordinary size, so that closing the connection does not reset it."""
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while num_bytes <= MAX_BODY_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _too_large(max_bytes: int) -> ContentTooLargeError:
    return ContentTooLargeError(f"the request body is larger than {max_bytes} bytes")


async def watch_disconnect(receive: Receive) -> None:
    """Wait until the client is gone, then raise ClientDisconnectedError. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnectedError


async def send_json(send: Send, body: bytes, *, status: int = 200, headers: Iterable[Header] = ()) -> None:
    """Send `body`, which is JSON, as the whole response."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [_JSON, length, *headers]})
    await send({"type": "http.response.body", "body": body})
