"""The Executor service: one scheduler's plans in, results out, over one bidirectional stream.

Owns streams and their order. Order of events of a stream: hello; an older stream is ended; the standing batch is
dropped; welcome; then plans and results, strictly in order. Reading, the model and writing are three tasks, so that
plans can wait while one runs. Heartbeats come from the event loop, which a long step cannot block: the model runs in
a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
import grpc.aio

from trivium import rpc, wire
from trivium.columns import ColumnError
from trivium.config import PROTOCOL_REVISION, ExecutorConfig, ModelInfo
from trivium.errors import EngineUnavailableError, InvalidRequestError
from trivium.executor.ledger import executor_ledger
from trivium.executor.model_runner import ModelRunner
from trivium.executor.model_thread import ModelThread, Unfinished
from trivium.executor.parallel.ranks import RankLostError
from trivium.executor.plan_check import PlanError
from trivium.ledger import register_ledger
from trivium.pooling import check_embed
from trivium.step import ModelRunnerOutput, SchedulerOutput
from trivium.v1 import executor_pb2, executor_pb2_grpc, types_pb2
from trivium.v1.ledger_pb2 import LedgerReply

logger = logging.getLogger(__name__)

SERVICE_NAME = "trivium.v1.Executor"
HEARTBEAT_S = 1.0
MAX_QUEUED_PLANS = 16  # read ahead of the model; beyond that the stream's flow control holds the scheduler back

Commands = AsyncIterator[executor_pb2.ExecuteCommand]
Context = grpc.aio.ServicerContext[executor_pb2.ExecuteCommand, executor_pb2.ExecuteEvent]


class StreamEndedError(Exception):
    """Why a stream is ended, as the status that its scheduler sees."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ExecuteStream:
    """One scheduler's stream. Owned by the event loop; the model thread only reads and clears `is_open`.

    `results` is not bounded by itself: it never holds more than the plans that `places` let in, and an answer for
    each grammar that the scheduler asked for.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.ended: asyncio.Future[StreamEndedError] = loop.create_future()
        self.results: asyncio.Queue[ModelRunnerOutput | executor_pb2.GrammarCompiled] = asyncio.Queue()
        self.places = asyncio.Semaphore(MAX_QUEUED_PLANS)
        self.last_step_done = 0
        self.is_open = True

    def end(self, code: grpc.StatusCode, message: str) -> None:
        """End the stream with a status; plans of it that have not started are dropped."""
        self.is_open = False
        if not self.ended.done():
            self.ended.set_result(StreamEndedError(code, message))

    def deliver(self, output: ModelRunnerOutput) -> None:
        self.last_step_done = output.step
        self.results.put_nowait(output)

    def deliver_grammar(self, key: int, error: InvalidRequestError | None) -> None:
        info = None if error is None else wire.error_to_proto(error)
        self.results.put_nowait(executor_pb2.GrammarCompiled(key=key, error=info))


class ExecutorService(executor_pb2_grpc.ExecutorServicer):
    """At most one stream is active: the newest that said hello."""

    def __init__(self, thread: ModelThread, epoch: int) -> None:
        self._thread = thread
        self._epoch = epoch
        self._num_steps_done = 0
        self._active: ExecuteStream | None = None
        self._streams: set[ExecuteStream] = set()
        self._end: tuple[grpc.StatusCode, str] | None = None

    def end_streams(self, code: grpc.StatusCode, message: str) -> None:
        """End every stream, and those that come until the server has stopped."""
        self._end = code, message
        for stream in self._streams:
            stream.end(code, message)

    async def fill_ledger(self, reply: LedgerReply) -> None:
        reply.open_streams = len(self._streams)
        if self._thread.runner is not None:
            reply.executor.CopyFrom(executor_ledger(self._thread.runner, steps_done=self._num_steps_done))

    async def Execute(self, request_iterator: Commands, context: Context) -> None:
        stream = ExecuteStream(asyncio.get_running_loop())
        self._streams.add(stream)
        if self._end is not None:
            stream.end(*self._end)
        try:
            await rpc.start_stream(context)
            await _first_to_finish(stream.ended, self._converse(stream, request_iterator, context))
            if stream.ended.done():
                raise stream.ended.result()
        except StreamEndedError as end:
            await context.abort(end.code, end.message)
        except asyncio.CancelledError:
            if context.cancelled():
                raise
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the executor is shutting down")
        finally:
            stream.is_open = False
            self._streams.discard(stream)
            if self._active is stream:
                self._active = None

    async def Embed(self, request: types_pb2.EmbedRequest, context: Context) -> types_pb2.EmbedResponse:
        async def handler() -> types_pb2.EmbedResponse:
            if not self._thread.loaded.done():
                raise EngineUnavailableError("the model is still loading", code="model_loading")
            info = self._thread.loaded.result()
            prompts, params = wire.embed_from_proto(request)
            check_embed(prompts, params, info)
            kind = params.resolve(is_encoder_decoder=info.is_encoder_decoder)
            vectors = await self._thread.run(lambda runner: runner.embed(prompts, kind, normalize=params.normalize))
            return wire.vectors_to_proto([vector.tolist() for vector in vectors])

        return await rpc.answer(context, handler)  # type: ignore[no-any-return]

    async def _converse(self, stream: ExecuteStream, commands: Commands, context: Context) -> None:
        """Returns when the scheduler closes its side."""
        await _check_hello(commands)
        info = await asyncio.shield(self._thread.loaded)
        await self._take_over(stream)
        welcome = executor_pb2.ExecuteWelcome(executor_epoch=self._epoch, model=wire.model_info_to_proto(info))
        await context.write(executor_pb2.ExecuteEvent(welcome=welcome))
        await _first_to_finish(self._read_plans(stream, commands), self._write_events(stream, context))

    async def _take_over(self, stream: ExecuteStream) -> None:
        """End the older stream, then drop the standing batch, after the step that may be running."""
        if self._active is not None:
            self._active.end(grpc.StatusCode.ABORTED, "a newer scheduler has taken over")
        self._active = stream
        reset = asyncio.get_running_loop().create_future()

        def drop_batch(runner: ModelRunner) -> None:
            runner.reset()
            self._thread.call_in_loop(_finish, reset)

        self._thread.submit(drop_batch)
        await reset

    async def _read_plans(self, stream: ExecuteStream, commands: Commands) -> None:
        async for command in commands:
            if command.WhichOneof("command") == "grammar":
                self._compile(stream, command.grammar)
                continue
            if command.WhichOneof("command") != "plan":
                raise StreamEndedError(grpc.StatusCode.INVALID_ARGUMENT, "expected a plan")
            try:
                plan = wire.plan_from_proto(command.plan)
            except (ColumnError, InvalidRequestError) as error:
                raise StreamEndedError(grpc.StatusCode.INVALID_ARGUMENT, f"malformed plan: {error}") from None
            await stream.places.acquire()
            self._submit(stream, plan)

    def _compile(self, stream: ExecuteStream, message: executor_pb2.CompileGrammar) -> None:
        """Have a grammar compiled beside the plans."""

        def done(error: InvalidRequestError | None) -> None:
            self._thread.call_in_loop(stream.deliver_grammar, message.key, error)

        try:
            is_set = message.HasField("structured_outputs")
            params = wire.structured_outputs_from_proto(message.structured_outputs) if is_set else None
        except InvalidRequestError as error:
            stream.deliver_grammar(message.key, error)
        else:
            self._thread.submit(lambda runner: runner.prepare_grammar(params, done))

    def _submit(self, stream: ExecuteStream, plan: SchedulerOutput) -> None:
        """Queue the plan for the model thread."""

        def deliver(output: ModelRunnerOutput) -> None:
            self._thread.call_in_loop(self._deliver, stream, output)

        def run_step(runner: ModelRunner) -> Unfinished | None:
            if not stream.is_open:
                return None
            try:
                return Unfinished(runner.start(plan), deliver)
            except PlanError as error:
                logger.warning("plan of step %d refused: %s", plan.step, error)
                # Closed here, too: the plans behind this one build on it.
                stream.is_open = False
                self._thread.call_in_loop(stream.end, grpc.StatusCode.INVALID_ARGUMENT, f"step {plan.step}: {error}")
                return None

        self._thread.submit(run_step)

    def _deliver(self, stream: ExecuteStream, output: ModelRunnerOutput) -> None:
        self._num_steps_done += 1
        stream.deliver(output)

    async def _write_events(self, stream: ExecuteStream, context: Context) -> None:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    output = await stream.results.get()
            except TimeoutError:
                heartbeat = executor_pb2.ExecuteHeartbeat(last_step_done=stream.last_step_done)
                await context.write(executor_pb2.ExecuteEvent(heartbeat=heartbeat))
                continue
            if isinstance(output, executor_pb2.GrammarCompiled):
                await context.write(executor_pb2.ExecuteEvent(grammar=output))
                continue
            stream.places.release()
            await context.write(executor_pb2.ExecuteEvent(result=wire.result_to_proto(output, self._epoch)))


async def serve(config: ExecutorConfig, listen: str, stop: asyncio.Event) -> None:
    """Serve the model on `listen` until `stop` is set. The health of SERVICE_NAME says when the model is loaded.

    Raises ConfigurationError if the model cannot be loaded or the address not bound, and whatever ended the model
    thread: the caller exits non-zero, and the scheduler rebuilds the batch with the next executor.
    """
    thread = ModelThread(config, asyncio.get_running_loop())
    epoch = rpc.new_epoch()
    service = ExecutorService(thread, epoch)
    server = rpc.Server(listen, (SERVICE_NAME,))
    executor_pb2_grpc.add_ExecutorServicer_to_server(service, server.grpc_server)
    register_ledger(server, "executor", epoch, service.fill_ledger)
    await server.start()
    thread.start()
    try:
        await _first_to_finish(stop.wait(), thread.failed, _announce(server, thread.loaded))
    finally:
        # A lost rank is like a lost executor: the next one goes on. A failed model would fail again.
        failure = thread.failed.result() if thread.failed.done() else None
        is_gone = failure is None or isinstance(failure, RankLostError)
        code = grpc.StatusCode.UNAVAILABLE if is_gone else grpc.StatusCode.INTERNAL
        service.end_streams(code, "the executor is shutting down" if failure is None else "the executor failed")
        await server.stop()
    if thread.failed.done():
        raise thread.failed.result()
    if thread.loaded.done():
        await thread.stop()


async def _announce(server: rpc.Server, loaded: asyncio.Future[ModelInfo]) -> None:
    """Turn healthy once the model is loaded, then wait forever."""
    await asyncio.shield(loaded)
    await server.set_ready(True)
    logger.info("executor ready on %s", server.address)
    await asyncio.Event().wait()


async def _check_hello(commands: Commands) -> None:
    command = await anext(commands, None)
    if command is None or command.WhichOneof("command") != "hello":
        raise StreamEndedError(grpc.StatusCode.FAILED_PRECONDITION, "the first message must be a hello")
    revision = command.hello.protocol_revision
    if revision != PROTOCOL_REVISION:
        message = f"protocol revision {revision} is not {PROTOCOL_REVISION}: run one release of all services"
        raise StreamEndedError(grpc.StatusCode.FAILED_PRECONDITION, message)


async def _first_to_finish(*awaitables: Coroutine[Any, Any, object] | asyncio.Future[Any]) -> None:
    """Wait for the first to finish, cancel the other coroutines, and raise what a finished coroutine raised."""
    tasks = [asyncio.create_task(item) for item in awaitables if asyncio.iscoroutine(item)]
    futures = [item for item in awaitables if asyncio.isfuture(item)]
    try:
        await asyncio.wait([*tasks, *futures], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
