"""Server and channel bootstrap for every service: options, health, error mapping, drain.

The options are the ones that measurably matter (docs/decisions.md): keepalive with `ping_timeout_ms` on both sides,
`min_ping_interval_without_data_ms` on servers, no proxy, no port sharing, explicit message limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from trivium.errors import ConfigurationError, EngineUnavailableError, InternalError, TriviumError, error_from_status

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

MAX_MESSAGE_BYTES = 64 * 2**20
CODE_METADATA = "trivium-code"
PARAM_METADATA = "trivium-param"

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
SERVER_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 5_000),
]
CHANNEL_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
]


def new_epoch() -> int:
    """A random 64-bit number that names one start of one process."""
    return secrets.randbits(64)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to `address` (`unix:/path` or `host:port`); it connects on first use and reconnects by itself."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


class Server:
    """A `grpc.aio` server with standard health. `set_ready` flips the health of the named services.

    The empty service name means "the process is alive" and is SERVING from start to stop.
    """

    def __init__(self, address: str, service_names: tuple[str, ...]) -> None:
        self.address = address
        self._service_names = service_names
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    @property
    def grpc_server(self) -> grpc.aio.Server:
        """Where servicers register themselves before `start`."""
        return self._server

    async def start(self) -> None:
        """Bind and serve. Raises ConfigurationError if the address cannot be bound."""
        try:
            bound = self._server.add_insecure_port(self.address)
        except RuntimeError:
            bound = 0
        if not bound and not self.address.startswith("unix:"):
            raise ConfigurationError(f"cannot listen on {self.address}: the address is taken or not of this machine")
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.set_ready(False)

    async def set_ready(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._service_names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, give running ones `grace_s`, end. Endless streams must have been closed before."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        await self._server.wait_for_termination()


class BidiCall(Generic[RequestT, ResponseT]):
    """Client end of a long-lived bidirectional stream. Owner: whoever opened it; `close` must be called.

    Reading and writing are tasks of their own, so that neither can block the other, and so that a caller may give up
    waiting: cancelling a gRPC read would cancel the whole stream. Nothing here is bounded: both sides answer messages
    one for one, or coalesce what they send.
    """

    def __init__(self, call: grpc.aio.StreamStreamCall[RequestT, ResponseT], *, silence_s: float) -> None:
        self._call = call
        self._silence_s = silence_s
        self._outbox: asyncio.Queue[RequestT] = asyncio.Queue()
        self._inbox: asyncio.Queue[ResponseT | TriviumError] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    def send(self, message: RequestT) -> None:
        """Queue `message`; never waits."""
        self._outbox.put_nowait(message)

    async def receive(self) -> ResponseT:
        """The next message.

        Raises EngineUnavailableError once the stream has ended, broken, or been silent for longer than `silence_s` (the
        other side sends heartbeats), and the sender's own TriviumError if it ended with a status.
        """
        message = await self._inbox.get()
        if isinstance(message, TriviumError):
            self._inbox.put_nowait(message)  # the stream stays ended for whoever asks next
            raise message
        return message

    async def close(self) -> None:
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # `_read` reports the cause
            while True:
                await self._call.write(await self._outbox.get())

    async def _read(self) -> None:
        self._inbox.put_nowait(await self._read_until_end())

    async def _read_until_end(self) -> TriviumError:
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    message = await self._call.read()
            except TimeoutError:
                return EngineUnavailableError(f"a service has been silent for {self._silence_s:.0f} s")
            except grpc.aio.AioRpcError as error:
                return error_from_rpc(error)
            if message is grpc.aio.EOF:
                return await self._final_status()
            self._inbox.put_nowait(cast(ResponseT, message))

    async def _final_status(self) -> TriviumError:
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return EngineUnavailableError("a service closed its stream")
        return error_from_status(code.name, await self._call.details() or "a service ended its stream")


async def check_health(channel: grpc.aio.Channel, service: str, timeout_s: float = 2.0) -> bool:
    """True if `service` behind `channel` says SERVING."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        request = health_pb2.HealthCheckRequest(service=service)
        reply = await stub.Check(request, timeout=timeout_s)  # type: ignore[attr-defined]
    except grpc.aio.AioRpcError:
        return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def start_stream(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Send the headers of a stream now. Call it first in a handler that may end its stream while it is writing.

    Headers otherwise travel with the first message: one that is given up on its way counts as never sent, the status
    tries to send headers again, gRPC refuses it, and the client waits until the server stops.
    """
    await context.send_initial_metadata(())


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: TriviumError) -> None:
    """End an RPC with the status, code and parameter of `error`. Does not return."""
    metadata = [(CODE_METADATA, error.code)]
    if error.param is not None:
        metadata.append((PARAM_METADATA, error.param.encode("ascii", "replace").decode()))
    await context.abort(grpc.StatusCode[error.grpc_status], error.message, trailing_metadata=tuple(metadata))


async def answer(context: grpc.aio.ServicerContext[Any, Any], handler: Callable[[], Awaitable[Any]]) -> Any:
    """Run a unary handler; TriviumError becomes its status, anything else INTERNAL with the cause in the log only.

    A CancelledError that is not the client's own is answered too: gRPC would send no status and hang the client.
    """
    try:
        return await handler()
    except TriviumError as error:
        await abort_with(context, error)
    except asyncio.CancelledError:
        if context.cancelled():
            raise
        await abort_with(context, EngineUnavailableError("the service is shutting down", code="draining"))
    except grpc.aio.AbortError:
        raise
    except Exception:
        logger.exception("handler failed")
        await abort_with(context, InternalError("internal error"))


def error_from_rpc(error: grpc.aio.AioRpcError) -> TriviumError:
    """The exception that the other side raised, rebuilt from status and trailing metadata."""
    metadata = {key: value for key, value in (error.trailing_metadata() or ())}
    code, param = metadata.get(CODE_METADATA), metadata.get(PARAM_METADATA)
    if code is None and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return EngineUnavailableError("a service behind the gateway is not reachable")
    if code is None and error.code() is grpc.StatusCode.UNKNOWN:
        return InternalError("internal error")
    return error_from_status(
        error.code().name,
        error.details() or "internal error",
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
    )
