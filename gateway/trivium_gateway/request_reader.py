"""From a POST request to the fields of its JSON body, for every endpoint alike."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.types import Receive, Scope

from trivium.errors import InvalidRequestError
from trivium_gateway.asgi import MAX_BODY_BYTES, check_media_type, read_body
from trivium_gateway.idempotency import IdempotencyKeys
from trivium_gateway.json_body import decode_fields
from trivium_gateway.metrics import GatewayMetrics

logger = logging.getLogger(__name__)

_MAX_SHOWN_CHARS = 40
_REFUSED_BY_NAME = frozenset({"chat_template"})  # by `check_template_fields`


class RequestReader:
    """Owner: the application. What no endpoint knows is ignored and counted, or with `is_strict` refused."""

    def __init__(self, metrics: GatewayMetrics, *, is_strict: bool = False) -> None:
        self._metrics = metrics
        self._is_strict = is_strict
        self._idempotency_keys = IdempotencyKeys()

    async def read(self, scope: Scope, receive: Receive, *, max_bytes: int = MAX_BODY_BYTES) -> dict[str, Any]:
        """The top-level fields of the body. Raises InvalidRequestError and ClientDisconnectedError."""
        check_media_type(scope)
        body = await read_body(scope, receive, max_bytes)
        self._idempotency_keys.check(scope, body)
        return decode_fields(body)

    def check_known(
        self, fields: dict[str, Any], request_type: type[msgspec.Struct], refused: Iterable[str] = ()
    ) -> None:
        """Look for fields that `request_type` does not have; `refused` are those that the endpoint refuses by name.

        Raises InvalidRequestError that names the first one, if this server is strict.
        """
        known = _REFUSED_BY_NAME.union(request_type.__struct_fields__, refused)
        unknown = [name[:_MAX_SHOWN_CHARS] for name in fields if name not in known]
        if not unknown:
            return
        if self._is_strict:
            param = unknown[0]
            raise InvalidRequestError(f"there is no field {param!r}", param=param, code="unknown_field")
        self._metrics.num_unknown_fields += len(unknown)
        logger.debug("fields without meaning here: %s", sorted(unknown)[:20])
