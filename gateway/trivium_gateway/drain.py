"""The end of a server's life: refuse what is new, wait for what runs, then cut what is left.

Order: `begin` (new requests are answered 503), `wait_idle` with a time limit, `cut` (what still runs fails with
`server_shutdown`), `wait_idle` once more for the last bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from trivium_gateway.errors import draining_error, shutdown_error


class Drain:
    """Counts the requests that run. Owned by the server; requests only enter, leave and watch for the cut."""

    def __init__(self) -> None:
        self._num_running = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._cut = asyncio.Event()

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def num_running(self) -> int:
        return self._num_running

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request. Raises EngineUnavailableError (`draining`) if no new one is taken."""
        if self._is_draining:
            raise draining_error()
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self._idle.set()

    def begin(self) -> None:
        """Take no new requests from now on."""
        self._is_draining = True

    def cut(self) -> None:
        """Fail every request that still runs."""
        self._cut.set()

    async def watch(self) -> None:
        """Wait for the cut, then raise EngineUnavailableError (`server_shutdown`)."""
        await self._cut.wait()
        raise shutdown_error()

    async def wait_idle(self, *, timeout_s: float) -> bool:
        """Wait until no request runs; False if that took longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
