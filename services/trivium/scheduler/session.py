"""A client's stream: what it asked for (`Session`), and what waits to be written to it (`Outbox`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from trivium.config import PROTOCOL_REVISION
from trivium.errors import InternalError, InvalidRequestError, TriviumError
from trivium.inputs import GenerationRequest
from trivium.outputs import ChoiceDelta
from trivium.scheduler.engine_loop import EngineLoop
from trivium.v1 import scheduler_pb2

logger = logging.getLogger(__name__)


class Outbox:
    """A DeltaSink for one client stream: rows collect until the writer takes them all as one batch.

    Light load: one batch per engine step. A slow reader: batches merge, and deltas of one choice with them, so memory
    is bounded by the generated text. Owner: the handler of the stream.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], ChoiceDelta] = {}  # (handle, choice index) -> everything since the last take
        self._errors: dict[int, TriviumError] = {}  # handle -> why the request failed
        self._filled = asyncio.Event()

    def deliver(self, handle: int, delta: ChoiceDelta) -> None:
        key = handle, delta.index
        before = self._rows.get(key)
        self._rows[key] = delta if before is None else _merge(before, delta)
        self._filled.set()

    def fail(self, handle: int, error: TriviumError) -> None:
        self._errors[handle] = error
        self._filled.set()

    def drop(self, handle: int) -> None:
        """Forget what is waiting for `handle`: its client has cancelled."""
        for key in [key for key in self._rows if key[0] == handle]:
            del self._rows[key]
        self._errors.pop(handle, None)

    async def take(self, timeout_s: float) -> tuple[list[tuple[int, ChoiceDelta]], list[tuple[int, TriviumError]]]:
        """All rows and errors as soon as there are any; both empty after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._filled.wait()
        except TimeoutError:
            return [], []
        self._filled.clear()
        rows = [(handle, delta) for (handle, _), delta in self._rows.items()]
        errors = list(self._errors.items())
        self._rows.clear()
        self._errors.clear()
        return rows, errors


def _merge(first: ChoiceDelta, second: ChoiceDelta) -> ChoiceDelta:
    return ChoiceDelta(
        index=first.index,
        token_ids=first.token_ids + second.token_ids,
        text=first.text + second.text,
        finish_reason=second.finish_reason,
        stop_reason=second.stop_reason,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        cumulative_logprob=second.cumulative_logprob,
        num_cached_tokens=first.num_cached_tokens,
    )


class Session:
    """The requests of one open `Session` stream, by the client's handles. Owner: the handler of the stream.

    A handle lives from its submit to the last delta of its last choice, an error, or a cancel.
    """

    def __init__(
        self, loop: EngineLoop, request_from: Callable[[scheduler_pb2.GenerateRequest], Awaitable[GenerationRequest]]
    ) -> None:
        self.outbox = Outbox()
        self.has_ended = False
        self._loop = loop
        self._request_from = request_from
        self._admissions: dict[int, asyncio.Task[None]] = {}  # handle -> task that tokenizes and submits it
        self._keys: dict[int, tuple[int, ...]] = {}  # handle -> keys of its running choices
        self._num_left: dict[int, int] = {}  # handle -> choices that have not finished

    async def check_hello(self, messages: AsyncIterator[scheduler_pb2.SessionCommand]) -> None:
        """Read the first message. Raises InvalidRequestError unless it is a hello of our protocol revision."""
        first = await anext(messages, None)
        if first is None or first.WhichOneof("command") != "hello":
            raise InvalidRequestError("a session begins with a hello", code="missing_hello")
        if first.hello.protocol_revision != PROTOCOL_REVISION:
            raise InvalidRequestError(
                f"protocol revision {first.hello.protocol_revision}, this server speaks {PROTOCOL_REVISION}",
                code="protocol_revision",
            )

    @contextlib.asynccontextmanager
    async def reading(self, messages: AsyncIterator[scheduler_pb2.SessionCommand]) -> AsyncIterator[None]:
        """Take commands from the client in a task of its own."""
        task = asyncio.create_task(self._read(messages))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def deliver(self, handle: int, delta: ChoiceDelta) -> None:
        self.outbox.deliver(handle, delta)
        if delta.finish_reason is not None:
            self._num_left[handle] -= 1
            if self._num_left[handle] == 0:
                self._forget(handle)

    def fail(self, handle: int, error: TriviumError) -> None:
        self.outbox.fail(handle, error)
        self._forget(handle)

    def abort_all(self) -> None:
        """The client is gone: end everything it asked for."""
        for handle in list(self._admissions):
            self._cancel(handle)

    async def _read(self, messages: AsyncIterator[scheduler_pb2.SessionCommand]) -> None:
        try:
            async for message in messages:
                match message.WhichOneof("command"):
                    case "submit":
                        self._submit(message.submit.handle, message.submit.request)
                    case "cancel":
                        for handle in message.cancel.handles:
                            self._cancel(handle)
                    case other:
                        logger.warning("session command %s ignored", other)
        finally:
            self.has_ended = True

    def _submit(self, handle: int, message: scheduler_pb2.GenerateRequest) -> None:
        if handle in self._admissions:
            self.outbox.fail(handle, InvalidRequestError(f"handle {handle} is in use", code="duplicate_handle"))
            return
        self._admissions[handle] = asyncio.create_task(self._admit(handle, message))

    async def _admit(self, handle: int, message: scheduler_pb2.GenerateRequest) -> None:
        try:
            request = await self._request_from(message)
            self._keys[handle] = self._loop.submit(request, self, handle)
            self._num_left[handle] = request.num_open_choices
        except TriviumError as error:
            self.fail(handle, error)
        except Exception:
            logger.exception("request %s failed on its way in", message.request_id)
            self.fail(handle, InternalError("internal error"))

    def _cancel(self, handle: int) -> None:
        """A handle that has ended is fine: a cancel may cross the last delta."""
        admission = self._admissions.get(handle)
        if admission is not None:
            admission.cancel()
        self._loop.abort(self._keys.get(handle, ()))
        self.outbox.drop(handle)
        self._forget(handle)

    def _forget(self, handle: int) -> None:
        self._admissions.pop(handle, None)
        self._keys.pop(handle, None)
        self._num_left.pop(handle, None)
