"""How many requests a caller may send in a minute.

A caller is an API key where the server wants one, else a client address: without a check, a new key in each request
would be a new caller.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network

from starlette.types import Scope

from trivium_gateway.asgi import header
from trivium_gateway.errors import RateLimitedError

MAX_CALLERS = 10_000
_MINUTE_S = 60.0
_IPV6_BITS = 64  # what one client is given; it chooses the rest of its address as it likes


class RateLimit:
    """A bucket of `max_per_minute` requests for each caller, which refills steadily in a minute. Owner: the FrontDoor.

    Remembers the last MAX_CALLERS callers; `clock` counts seconds.
    """

    def __init__(self, max_per_minute: int, *, by_key: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_per_minute = max_per_minute
        self._interval_s = _MINUTE_S / max_per_minute
        self._by_key = by_key
        self._clock = clock
        self._full_at_s: OrderedDict[str, float] = OrderedDict()  # caller -> when its bucket is full again

    def take(self, scope: Scope) -> None:
        """Count one request. Raises RateLimitedError, and counts nothing, if the caller's bucket is empty."""
        caller = (header(scope, b"authorization") or "") if self._by_key else _address(scope)
        now_s = self._clock()
        full_at_s = max(self._full_at_s.pop(caller, now_s), now_s)
        wait_s = full_at_s + self._interval_s - _MINUTE_S - now_s
        is_empty = wait_s > 1e-6
        self._full_at_s[caller] = full_at_s if is_empty else full_at_s + self._interval_s
        if len(self._full_at_s) > MAX_CALLERS:
            self._full_at_s.popitem(last=False)
        if is_empty:
            raise RateLimitedError(
                f"more than {self._max_per_minute} requests in a minute", retry_after_s=math.ceil(wait_s)
            )


def _address(scope: Scope) -> str:
    host = str((scope.get("client") or ("",))[0])
    if ":" not in host:
        return host
    address = IPv6Address(host.partition("%")[0])
    return str(address.ipv4_mapped or IPv6Network((address, _IPV6_BITS), strict=False))
