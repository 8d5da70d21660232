"""The Ledger service: what a process holds right now, asked over gRPC.

Every gRPC service registers it with `register_ledger` and adds its own numbers in a callback; the numbers of the
process are the same everywhere. Answering takes well under a millisecond and waits for no model, so a service that
is busy, or still loading, answers too. Knows no service.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import psutil

from trivium import rpc
from trivium.v1 import ledger_pb2, ledger_pb2_grpc
from trivium.v1.ledger_pb2 import LedgerReply

LEDGER_TIMEOUT_S = 1.0
PEER_TIMEOUT_S = 0.5  # for what an asked service asks in its turn: less than what it is given itself

Fill = Callable[[LedgerReply], Awaitable[None]]


class ProcessLedger:
    """The numbers of this process. `began_s` (monotonic clock) is when it began, by default now."""

    def __init__(self, *, began_s: float | None = None) -> None:
        self._began_s = time.monotonic() if began_s is None else began_s
        self._process = psutil.Process()

    def reply(self, service: str, epoch: int) -> LedgerReply:
        """A reply of `service` with the numbers of the process. To be called in its event loop."""
        reply = LedgerReply(
            service=service,
            epoch=epoch,
            uptime_s=time.monotonic() - self._began_s,
            asyncio_tasks=len(asyncio.all_tasks()),
        )
        with self._process.oneshot():
            reply.threads = self._process.num_threads()
            reply.resident_memory_bytes = self._process.memory_info().rss
            if psutil.POSIX:
                reply.open_file_descriptors = self._process.num_fds()
        return reply


class LedgerServicer(ledger_pb2_grpc.LedgerServicer):
    """Answers for one service. Holds no numbers: `fill` adds those of the service when they are asked for."""

    def __init__(self, service: str, epoch: int, fill: Fill) -> None:
        self._service = service
        self._epoch = epoch
        self._fill = fill
        self._process = ProcessLedger()

    async def GetLedger(self, request: ledger_pb2.GetLedgerRequest, context: Any) -> LedgerReply:
        async def handle() -> LedgerReply:
            reply = self._process.reply(self._service, self._epoch)
            await self._fill(reply)
            return reply

        return await rpc.answer(context, handle)  # type: ignore[no-any-return]


def register_ledger(server: rpc.Server, service: str, epoch: int, fill: Fill) -> None:
    """Let `server` answer `GetLedger` for `service`. Before its `start`."""
    ledger_pb2_grpc.add_LedgerServicer_to_server(LedgerServicer(service, epoch, fill), server.grpc_server)


async def ask_ledger(channel: grpc.aio.Channel, timeout_s: float = LEDGER_TIMEOUT_S) -> LedgerReply | None:
    """The ledger of the service behind `channel`; None if there is no answer within `timeout_s`."""
    stub = ledger_pb2_grpc.LedgerStub(channel)
    with contextlib.suppress(grpc.aio.AioRpcError):
        reply: LedgerReply = await stub.GetLedger(ledger_pb2.GetLedgerRequest(), timeout=timeout_s)
        return reply
    return None
