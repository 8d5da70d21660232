"""The header `Idempotency-Key`: one key, one request.

Nothing is answered twice from memory: a repeated request runs again. What is remembered is which request a key stood
for, so that a key that is used again by mistake is found.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict

from starlette.types import Scope

from trivium.errors import InvalidRequestError
from trivium_gateway.asgi import header

MAX_KEYS = 16_384

_HEADER = "Idempotency-Key"
_KEY = re.compile(r"[ -~]{1,255}")
_DIGEST_BYTES = 16


class IdempotencyKeys:
    """The last MAX_KEYS keys, by digest, each with a digest of its request. Owner: the RequestReader."""

    def __init__(self) -> None:
        self._requests: OrderedDict[bytes, bytes] = OrderedDict()  # key of a caller -> request

    def check(self, scope: Scope, body: bytes) -> None:
        """Raise InvalidRequestError if the request's key, in the hands of this caller, stood for another request."""
        key = header(scope, _HEADER.lower().encode())
        if key is None:
            return
        if not _KEY.fullmatch(key):
            raise InvalidRequestError(f"{_HEADER} must be 1 to 255 printable ASCII characters", param=_HEADER)
        caller = _digest((header(scope, b"authorization") or "").encode(), key.encode())
        request = _digest(scope["path"].encode(), body)
        known = self._requests.pop(caller, request)
        self._requests[caller] = known
        while len(self._requests) > MAX_KEYS:
            self._requests.popitem(last=False)
        if known != request:
            raise InvalidRequestError(
                f"{_HEADER} has been used for another request", param=_HEADER, code="idempotency_mismatch"
            )


def _digest(name: bytes, data: bytes) -> bytes:
    hasher = hashlib.blake2b(name + b"\0", digest_size=_DIGEST_BYTES)
    hasher.update(data)
    return hasher.digest()
