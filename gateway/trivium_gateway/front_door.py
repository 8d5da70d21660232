"""The one middleware: request id, key, rate, host, drain, and every failure turned into an OpenAI error body.

Order for each request: read the request id (made up if absent), check the key, count against the rate limit,
check id and Host, enter the drain count, run the endpoint. Whatever the endpoint raises before its first byte becomes
a response here; what it raises later is its own to report, and reaching this module then means a bug: it is logged and
the connection is cut.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trivium.errors import InvalidRequestError
from trivium_gateway.asgi import discard_body, header, send_json
from trivium_gateway.auth import OPEN_PATHS, ApiKeyCheck
from trivium_gateway.drain import Drain
from trivium_gateway.errors import ClientDisconnectedError, Header, client_error, error_body, error_headers
from trivium_gateway.metrics import GatewayMetrics
from trivium_gateway.rate_limit import RateLimit

logger = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 128

_REQUEST_ID = re.compile(rf"[ -~]{{1,{MAX_REQUEST_ID_CHARS}}}")
_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")


def new_request_id() -> str:
    """An id for a request whose client gave none."""
    return f"req-{uuid.uuid4().hex}"


class FrontDoor:
    """ASGI middleware around all routes. Holds no state of its own."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: ApiKeyCheck,
        rate_limit: RateLimit | None,
        drain: Drain,
        metrics: GatewayMetrics,
    ) -> None:
        self._app = app
        self._api_key = api_key
        self._rate_limit = rate_limit
        self._drain = drain
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        given_id = header(scope, b"x-request-id")
        is_valid_id = given_id is None or _REQUEST_ID.fullmatch(given_id) is not None
        request_id = given_id if given_id and is_valid_id else new_request_id()
        scope["trivium.request_id"] = request_id
        reply = _Reply(send, (b"x-request-id", request_id.encode()))
        try:
            self._api_key.check(scope["path"], scope["headers"])
            if self._rate_limit is not None and scope["method"] == "POST":
                self._rate_limit.take(scope)
            _check_head(scope, is_valid_id)
            if self._drain.is_draining and scope["path"] not in OPEN_PATHS:
                await discard_body(receive)
            await self._run(scope, receive, reply)
        except ClientDisconnectedError:
            reply.status = 499
        except Exception as error:
            await _answer_failure(error, reply, request_id)
        if scope["path"] not in OPEN_PATHS:
            took_s = time.monotonic() - began_s
            self._metrics.count_response(scope["path"], scope.get("trivium.model"), reply.status or 0)
            logger.info("%s: %s %.80r -> %s, %.3f s", request_id, scope["method"], scope["path"], reply.status, took_s)

    async def _run(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, reply.send)
            return
        with self._drain.request():
            await self._app(scope, receive, reply.send)


class _Reply:
    """`send` of one request: adds the request id to the response and remembers its status."""

    def __init__(self, send: Send, header: Header) -> None:
        self._send = send
        self._header = header
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], self._header]
        await self._send(message)


async def _answer_failure(error: Exception, reply: _Reply, request_id: str) -> None:
    shown = client_error(error)
    if shown is not error:
        logger.error("%s: failed", request_id, exc_info=error)
    if reply.status is not None:
        raise error
    await send_json(reply.send, error_body(shown), status=shown.http_status, headers=error_headers(shown))


def _check_head(scope: Scope, is_valid_id: bool) -> None:
    """Raise InvalidRequestError for a request id, Host or upgrade that is not taken."""
    if not is_valid_id:
        raise InvalidRequestError(
            f"X-Request-Id must be 1 to {MAX_REQUEST_ID_CHARS} printable ASCII characters",
            param="X-Request-Id",
            code="invalid_request_id",
        )
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    is_optional = scope["http_version"] == "1.0"
    if len(hosts) > 1 or not all(map(_HOST.fullmatch, hosts)) or not (hosts or is_optional):
        raise InvalidRequestError("the Host header is missing or not a host name", param="Host", code="invalid_host")
    if (header(scope, b"upgrade") or "").strip().lower() == "websocket":
        raise InvalidRequestError("this server has no WebSocket routes", code="upgrade_not_supported")
