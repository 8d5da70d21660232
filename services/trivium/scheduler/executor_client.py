"""The scheduler's way to its executor: plans out, results in, over one `Execute` stream."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Protocol

import grpc
import grpc.aio

from trivium import rpc, wire
from trivium.columns import ColumnError
from trivium.config import PROTOCOL_REVISION, ModelInfo
from trivium.errors import EngineUnavailableError, TriviumError
from trivium.ledger import PEER_TIMEOUT_S, ask_ledger
from trivium.step import ModelRunnerOutput, SchedulerOutput
from trivium.structured_outputs import StructuredOutputsParams
from trivium.v1 import executor_pb2, executor_pb2_grpc, types_pb2
from trivium.v1.ledger_pb2 import LedgerReply

logger = logging.getLogger(__name__)

SILENCE_S = 15.0  # the executor sends a heartbeat every second, also during a long step
RECONNECT_S = 0.2
EMBED_TIMEOUT_S = 120.0


class ExecutorClient(Protocol):
    """Runs plans in order. After `connect` the standing batch is empty and all blocks are free."""

    async def connect(self) -> ModelInfo:
        """Wait for an executor, however long that takes."""
        ...

    def submit(self, plan: SchedulerOutput) -> None:
        """Queue `plan`; never waits."""
        ...

    async def next_result(self) -> ModelRunnerOutput:
        """The result of the oldest plan that has none yet. Raises EngineUnavailableError if the executor is lost."""
        ...

    async def compile_grammar(self, params: StructuredOutputsParams | None) -> None:
        """Return when a plan may use `params` without making others wait.

        Raises InvalidRequestError, and EngineUnavailableError if the executor is lost meanwhile. Only progresses while
        somebody waits for `next_result`.
        """
        ...

    async def close(self) -> None: ...


class GrpcExecutorClient:
    """ExecutorClient over gRPC. Results carry the executor's epoch; one of another epoch is dropped."""

    def __init__(self, address: str, scheduler_epoch: int) -> None:
        self._channel = rpc.open_channel(address)
        self._stub = executor_pb2_grpc.ExecutorStub(self._channel)
        self._scheduler_epoch = scheduler_epoch
        self._executor_epoch = 0
        self._call: rpc.BidiCall[executor_pb2.ExecuteCommand, executor_pb2.ExecuteEvent] | None = None
        self._grammar_keys = itertools.count(1)
        self._grammars: dict[int, asyncio.Future[None]] = {}  # key -> the answer to come

    async def connect(self) -> ModelInfo:
        while True:
            await self._hang_up()
            try:
                return await self._hello()
            except EngineUnavailableError as error:
                logger.debug("no executor yet: %s", error.message)
            except (TriviumError, ColumnError) as error:
                logger.warning("executor refused: %s", error)
            await asyncio.sleep(RECONNECT_S)

    def submit(self, plan: SchedulerOutput) -> None:
        assert self._call is not None, "submit before connect"
        self._call.send(executor_pb2.ExecuteCommand(plan=wire.plan_to_proto(plan)))

    async def next_result(self) -> ModelRunnerOutput:
        assert self._call is not None, "next_result before connect"
        while True:
            event = await self._call.receive()
            kind = event.WhichOneof("event")
            if kind == "result" and event.result.executor_epoch == self._executor_epoch:
                return wire.result_from_proto(event.result)
            if kind == "grammar":
                self._settle(event.grammar)

    async def compile_grammar(self, params: StructuredOutputsParams | None) -> None:
        if self._call is None:
            raise EngineUnavailableError("the executor is gone")
        key, compiled = next(self._grammar_keys), asyncio.get_running_loop().create_future()
        self._grammars[key] = compiled
        structured = None if params is None else wire.structured_outputs_to_proto(params)
        message = executor_pb2.CompileGrammar(key=key, structured_outputs=structured)
        self._call.send(executor_pb2.ExecuteCommand(grammar=message))
        try:
            await compiled
        finally:
            self._grammars.pop(key, None)

    async def embed(self, request: types_pb2.EmbedRequest) -> types_pb2.EmbedResponse:
        """Vectors of prompts. Independent of the stream. Raises TriviumError."""
        try:
            response: types_pb2.EmbedResponse = await self._stub.Embed(request, timeout=EMBED_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise rpc.error_from_rpc(error) from None
        return response

    async def ledger(self) -> LedgerReply | None:
        """What the executor holds; None if it does not say so in time. Independent of the stream."""
        return await ask_ledger(self._channel, PEER_TIMEOUT_S)

    async def close(self) -> None:
        await self._hang_up()
        await self._channel.close()

    async def _hello(self) -> ModelInfo:
        hello = executor_pb2.ExecuteHello(scheduler_epoch=self._scheduler_epoch, protocol_revision=PROTOCOL_REVISION)
        self._call = rpc.BidiCall(self._stub.Execute(wait_for_ready=True), silence_s=SILENCE_S)
        self._call.send(executor_pb2.ExecuteCommand(hello=hello))
        while True:
            event = await self._call.receive()
            if event.WhichOneof("event") == "welcome":
                self._executor_epoch = event.welcome.executor_epoch
                return wire.model_info_from_proto(event.welcome.model)

    def _settle(self, message: executor_pb2.GrammarCompiled) -> None:
        compiled = self._grammars.pop(message.key, None)
        if compiled is None or compiled.done():
            return
        if message.HasField("error"):
            compiled.set_exception(wire.error_from_proto(message.error))
        else:
            compiled.set_result(None)

    async def _hang_up(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            await call.close()
        for compiled in self._grammars.values():
            if not compiled.done():
                compiled.set_exception(EngineUnavailableError("the executor is gone"))
        self._grammars.clear()
