"""Who may call: one API key, compared in constant time.

Deny by default: everything needs the key except the two paths in `OPEN_PATHS`, whether the path exists or not.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from trivium.errors import AuthenticationError
from trivium_gateway.errors import Header

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})

_SCHEME = b"Bearer "


class ApiKeyCheck:
    """Compares the bearer token of a request with the configured key; without a key every request passes.

    Digests are compared, so that neither the length nor a common prefix of the key shows in the time it takes.
    """

    def __init__(self, api_key: str | None) -> None:
        self._digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    def check(self, path: str, headers: Iterable[Header]) -> None:
        """Raise AuthenticationError unless the request may go on."""
        if self._digest is None or path in OPEN_PATHS:
            return
        values = [value for name, value in headers if name == b"authorization"]
        given = values[0] if len(values) == 1 and values[0].startswith(_SCHEME) else _SCHEME
        digest = hashlib.sha256(given[len(_SCHEME) :]).digest()
        if not hmac.compare_digest(digest, self._digest):
            raise AuthenticationError("the API key is missing or wrong; send it as 'Authorization: Bearer KEY'")
