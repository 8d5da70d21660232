"""`RemoteEngine`: an EngineClient over gRPC. One multiplexed `Session` with a scheduler, unary calls to a tokenizer.

The session is opened again whenever it breaks, and every request that was running is submitted again with what its
caller already has (`ResumedChoice`): a scheduler that dies and comes back is a pause, not an error.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import grpc.aio

from trivium import columns, rpc, wire
from trivium.config import PROTOCOL_REVISION, ModelInfo
from trivium.errors import EngineUnavailableError, InternalError, TriviumError
from trivium.inputs import EncodedPair, GenerationRequest, PairTexts, ResumedChoice
from trivium.ledger import ask_ledger
from trivium.outputs import ChoiceDelta, TokenText
from trivium.pooling import PoolingParams
from trivium.structured_outputs import StructuredOutputsParams
from trivium.tokenizer_client import TokenizerClient
from trivium.v1 import scheduler_pb2, scheduler_pb2_grpc
from trivium.v1.ledger_pb2 import LedgerReply

logger = logging.getLogger(__name__)

TOKENIZER_SERVICE = "trivium.v1.Tokenizer"
SILENCE_S = 10.0  # the scheduler sends a heartbeat every second
RECONNECT_S = 0.1
RECOVERY_S = 60.0  # how long a request waits for a lost scheduler before it fails
MAX_ATTEMPTS = 3  # how often one request is submitted again


@dataclass(slots=True)
class _Delivered:
    """What the caller has of one choice."""

    token_ids: list[int] = field(default_factory=list)
    num_chars: int = 0
    is_finished: bool = False


@dataclass(slots=True)
class _LiveRequest:
    """A request between submit and its last delta. Owner: RemoteEngine.

    `choices` says what is in `inbox` or was taken from it: that is not asked for again.
    """

    request: GenerationRequest
    inbox: asyncio.Queue[ChoiceDelta | TriviumError]
    choices: dict[int, _Delivered]  # choice index -> what was delivered
    num_attempts: int = 1

    def record(self, delta: ChoiceDelta) -> None:
        choice = self.choices[delta.index]
        choice.token_ids.extend(delta.token_ids)
        choice.num_chars += len(delta.text)
        choice.is_finished = delta.finish_reason is not None

    @property
    def is_finished(self) -> bool:
        return all(choice.is_finished for choice in self.choices.values())

    def resumed(self) -> GenerationRequest:
        """The request that goes on where the caller's copy ends."""
        resume = tuple(
            ResumedChoice(index, tuple(choice.token_ids), choice.num_chars, choice.is_finished)
            for index, choice in self.choices.items()
            if choice.token_ids or choice.num_chars or choice.is_finished
        )
        return replace(self.request, resume=resume)


class RemoteEngine:
    """EngineClient for one model behind a scheduler and a tokenizer. `start` connects in the background."""

    def __init__(self, *, name: str, scheduler_address: str, tokenizer_address: str) -> None:
        self._name = name
        self._channel = rpc.open_channel(scheduler_address)
        self._stub = scheduler_pb2_grpc.SchedulerStub(self._channel)
        self._tokenizer_channel = rpc.open_channel(tokenizer_address)
        self._tokenizer = TokenizerClient(name, self._tokenizer_channel)
        self._epoch = rpc.new_epoch()
        self._handles = itertools.count(1)
        self._live: dict[int, _LiveRequest] = {}  # handle -> request
        self._info: ModelInfo | None = None
        self._call: rpc.BidiCall[scheduler_pb2.SessionCommand, scheduler_pb2.SessionEvent] | None = None
        self._has_tokenizer = False
        self._lost_since: float | None = None  # monotonic clock; None while a session is open
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to connect; returns at once."""
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._find_tokenizer())]

    @property
    def model_info(self) -> ModelInfo:
        if self._info is None:
            raise EngineUnavailableError(f"model {self._name} is still loading", code="model_loading")
        return self._info

    def is_ready(self) -> bool:
        return self._call is not None and self._has_tokenizer

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return await self._tokenizer.encode(texts, add_special_tokens=add_special_tokens)

    async def encode_pair(self, texts: PairTexts) -> EncodedPair:
        return await self._tokenizer.encode_pair(texts)

    async def check_grammar(self, params: StructuredOutputsParams) -> None:
        await self._tokenizer.check_grammar(params)

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        return await self._tokenizer.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return await self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    async def token_texts(self, token_ids: Collection[int]) -> Mapping[int, TokenText]:
        return await self._tokenizer.token_texts(token_ids)

    async def embed(self, prompts: Sequence[Sequence[int]], params: PoolingParams) -> list[Sequence[float]]:
        """Asked again while a service behind is gone: the same prompts have the same vectors."""
        request = wire.embed_to_proto(self._name, prompts, params)
        deadline = time.monotonic() + RECOVERY_S
        while True:
            left_s = max(0.001, deadline - time.monotonic())
            try:
                return wire.vectors_from_proto(await self._stub.Embed(request, timeout=left_s, wait_for_ready=True))
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise rpc.error_from_rpc(error) from None
            except columns.ColumnError as error:
                raise InternalError(str(error)) from None
            await asyncio.sleep(RECONNECT_S)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[ChoiceDelta, None]:
        assert request.sampling.seed is not None, "the caller draws a seed, so that the request can be resumed"
        handle = next(self._handles)
        live = _LiveRequest(request, asyncio.Queue(), {index: _Delivered() for index in range(request.sampling.n)})
        self._live[handle] = live
        self._submit(handle, request)
        num_left = request.sampling.n
        try:
            while num_left:
                news = await live.inbox.get()
                if isinstance(news, TriviumError):
                    raise news
                num_left -= news.finish_reason is not None
                yield news
        finally:
            del self._live[handle]
            if not live.is_finished:
                self._send(scheduler_pb2.SessionCommand(cancel=scheduler_pb2.Cancel(handles=[handle])))

    async def ledger(self) -> dict[str, LedgerReply | None]:
        """Of "scheduler", "executor" (asked by the scheduler) and "tokenizer"."""
        scheduler, tokenizer = await asyncio.gather(ask_ledger(self._channel), ask_ledger(self._tokenizer_channel))
        executor = next((peer for peer in scheduler.peers if peer.service == "executor"), None) if scheduler else None
        return {"scheduler": scheduler, "executor": executor, "tokenizer": tokenizer}

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()
        await self._tokenizer_channel.close()

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._hold_session()
                except TriviumError as error:
                    self._lose_session(error)
                except columns.ColumnError as error:
                    self._lose_session(InternalError(str(error)))
                await asyncio.sleep(RECONNECT_S)
        except Exception:  # a bug here must reach the callers, not leave them waiting
            logger.exception("session with model %s failed", self._name)
            self._fail_live(InternalError("internal error"))
            raise
        finally:
            self._fail_live(EngineUnavailableError("the server is shutting down", code="draining"))

    async def _find_tokenizer(self) -> None:
        """Wait until the tokenizer has loaded. If it is lost later, calls wait for it: that is no loss of readiness."""
        while not await rpc.check_health(self._tokenizer_channel, TOKENIZER_SERVICE):
            await asyncio.sleep(RECONNECT_S)
        self._has_tokenizer = True

    async def _hold_session(self) -> None:
        """Open a session, submit again what was running, and hand out deltas until the session breaks."""
        call = rpc.BidiCall(self._stub.Session(wait_for_ready=True), silence_s=SILENCE_S)
        try:
            hello = scheduler_pb2.SessionHello(client_epoch=self._epoch, protocol_revision=PROTOCOL_REVISION)
            call.send(scheduler_pb2.SessionCommand(hello=hello))
            while self._call is None:
                event = await call.receive()
                if event.WhichOneof("event") == "welcome":
                    self._info = wire.model_info_from_proto(event.welcome.model)
                    self._call = call
                    self._lost_since = None
            logger.info("session with model %s is open", self._name)
            for handle, live in list(self._live.items()):
                self._submit(handle, live.resumed())
            while True:
                event = await call.receive()
                if event.WhichOneof("event") == "batch":
                    self._distribute(event.batch)
        finally:
            self._call = None
            await call.close()

    def _distribute(self, batch: scheduler_pb2.DeltaBatch) -> None:
        rows, errors = wire.delta_batch_from_proto(batch)
        for handle, delta in rows:
            live = self._live.get(handle)
            if live is not None:  # else cancelled meanwhile
                live.record(delta)
                live.inbox.put_nowait(delta)
        for handle, error in errors:
            if handle in self._live:
                self._live[handle].inbox.put_nowait(error)

    def _submit(self, handle: int, request: GenerationRequest) -> None:
        """Send `request`, or leave it to the next session."""
        self._send(
            scheduler_pb2.SessionCommand(
                submit=scheduler_pb2.Submit(handle=handle, request=wire.generation_request_to_proto(request))
            )
        )

    def _send(self, command: scheduler_pb2.SessionCommand) -> None:
        if self._call is not None:
            self._call.send(command)

    def _lose_session(self, error: TriviumError) -> None:
        """Decide who waits for the next session: not those that have waited or tried too often."""
        now = time.monotonic()
        if self._lost_since is None:
            self._lost_since = now
            level = logging.DEBUG if self._info is None else logging.WARNING  # before the first session: still starting
            logger.log(level, "no session with model %s: %s", self._name, error.message)
            for live in self._unfinished():
                live.num_attempts += 1
                if live.num_attempts > MAX_ATTEMPTS:
                    live.inbox.put_nowait(EngineUnavailableError("the request's scheduler failed again and again"))
        elif now - self._lost_since > RECOVERY_S:
            self._fail_live(EngineUnavailableError(f"model {self._name} has been unreachable for {RECOVERY_S:.0f} s"))

    def _fail_live(self, error: TriviumError) -> None:
        for live in self._unfinished():
            live.inbox.put_nowait(error)

    def _unfinished(self) -> list[_LiveRequest]:
        return [live for live in self._live.values() if not live.is_finished]
