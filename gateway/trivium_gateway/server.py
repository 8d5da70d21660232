"""Runs the application under uvicorn: a socket of our own, our HTTP protocol, and an end that loses no stream.

Order at the end (`stop` is set): new requests are refused while the socket is still open, running ones get
`drain_timeout_s`, what is left is cut, and only then the sockets are closed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from trivium.errors import ConfigurationError
from trivium_gateway.drain import Drain
from trivium_gateway.http_protocol import GatewayHttpProtocol

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that the side that sends is the side that closes
CUT_TIMEOUT_S = 1.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the process that runs us decides when to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises ConfigurationError with what is wrong."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise ConfigurationError(f"cannot listen on {host!r}: not an address of this machine") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        reasons = {
            errno.EADDRINUSE: "the port is already in use",
            errno.EACCES: "not permitted",
            errno.EADDRNOTAVAIL: "not an address of this machine",
        }
        reason = reasons.get(error.errno or 0, error.strerror)
        raise ConfigurationError(f"cannot listen on {host}:{port}: {reason}") from None
    return listener


async def run_server(
    app: ASGIApp,
    listener: socket.socket,
    *,
    drain: Drain,
    stop: asyncio.Event,
    drain_timeout_s: float,
) -> None:
    """Serve `app` on `listener` until `stop` is set, then drain. Closes the listener."""
    config = uvicorn.Config(
        app,
        http=GatewayHttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    host, port = listener.getsockname()[:2]
    logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        drain.begin()
        logger.info("draining %d requests", drain.num_running)
        if not serving.done() and not await drain.wait_idle(timeout_s=drain_timeout_s):
            logger.warning("cutting %d requests that ran longer than %.1f s", drain.num_running, drain_timeout_s)
            drain.cut()
            await drain.wait_idle(timeout_s=CUT_TIMEOUT_S)
    finally:
        stopping.cancel()
        server.should_exit = True
        await serving
        listener.close()
