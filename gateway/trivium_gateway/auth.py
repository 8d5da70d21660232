"""Who may call: one API key, compared in constant time.

Deny by default: everything needs the key except the paths in `OPEN_PATHS`, whether the path exists or not.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from trivium.errors import AuthenticationError
from trivium_gateway.errors import Header

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})

_SCHEME = b"Bearer "
_TENANT_BYTES = 16


def tenant_of(user: str | None, headers: Iterable[Header]) -> str:
    """Whose turn a request waits for: the user that it names, of the key that it came with; "" for neither.

    A digest: keys and users appear in no log and no message between processes.
    """
    key = next((value for name, value in headers if name == b"authorization"), b"")
    if not key and not user:
        return ""
    return hashlib.blake2b(key + b"\0" + (user or "").encode(), digest_size=_TENANT_BYTES).hexdigest()


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
