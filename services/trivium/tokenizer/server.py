"""The tokenizer service: encode, render, detokenize for any number of models.

Owns the gRPC side only. Order at the start: listen (alive, not ready), load all models, ready. Order at the end: not
ready, end the Detokenize streams, refuse new calls, give running ones their grace.

CPU work runs in a bounded pool of threads, so that the event loop answers health checks and streams while a long text
is tokenized; small pushes of a Detokenize stream are cheaper than the way to a thread and run on the loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc.aio

from trivium import rpc, wire
from trivium.config import ServedModel
from trivium.errors import (
    ConfigurationError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
)
from trivium.ledger import register_ledger
from trivium.tokenizer import chat_template
from trivium.tokenizer.detokenize_session import DetokenizeSession, num_ids
from trivium.tokenizer.grammar_check import GrammarChecker
from trivium.tokenizer.time_limit import TimeLimit, TimeLimitExceededError
from trivium.tokenizer.tokenizer import Tokenizer
from trivium.v1 import tokenizer_pb2, tokenizer_pb2_grpc, types_pb2
from trivium.v1.ledger_pb2 import LedgerReply, TokenizerLedger

logger = logging.getLogger(__name__)

SERVICE_NAME = "trivium.v1.Tokenizer"
MAX_WAITING_CALLS = 1024
MAX_INLINE_IDS = 256
MAX_TOKENS = 16384  # ids in one GetTokens
MAX_DECODED_IDS = 2**20

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


async def serve(
    models: Sequence[ServedModel], listen: str, stop: asyncio.Event, *, revision: str | None = None
) -> None:
    """Serve the tokenizers of `models`, from hub revision `revision`, at `listen` until `stop` is set.

    Raises ConfigurationError if a model cannot be loaded or the address cannot be bound.
    """
    if not models:
        raise ConfigurationError("a tokenizer needs at least one model")
    pool = ThreadPoolExecutor(max_workers=max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="tokenizer")
    server = rpc.Server(listen, (SERVICE_NAME,))
    epoch = rpc.new_epoch()
    servicer = TokenizerServicer(pool, epoch)
    tokenizer_pb2_grpc.add_TokenizerServicer_to_server(servicer, server.grpc_server)
    register_ledger(server, "tokenizer", epoch, servicer.fill_ledger)
    try:
        await server.start()
        await servicer.load(models, revision)
        await server.set_ready(True)
        await stop.wait()
    finally:
        await server.set_ready(False)
        servicer.end_streams()
        await server.stop()
        await servicer.close()
        pool.shutdown(wait=False, cancel_futures=True)


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServicer):
    """The handlers. Owned by `serve`; stateless but for the streams that are open."""

    def __init__(self, pool: ThreadPoolExecutor, epoch: int) -> None:
        self._pool = pool
        self._epoch = epoch
        self._tokenizers: dict[str, Tokenizer] = {}  # served name -> tokenizer
        self._grammars: dict[str, GrammarChecker] = {}  # served name -> its grammars
        self._is_loaded = False
        self._is_stopping = False
        self._num_waiting = 0
        self._streams: set[asyncio.Task[Any]] = set()
        self._sessions: set[DetokenizeSession] = set()

    async def load(self, models: Sequence[ServedModel], revision: str | None) -> None:
        """Load the tokenizers, one after the other, off the loop. Raises ConfigurationError."""
        for model in models:
            start = time.perf_counter()
            tokenizer = await asyncio.get_running_loop().run_in_executor(
                self._pool, Tokenizer.load, model.source, revision
            )
            self._tokenizers[model.name] = tokenizer
            self._grammars[model.name] = GrammarChecker(tokenizer.grammar_vocabulary)
            seconds = time.perf_counter() - start
            logger.info(
                "tokenizer of %s loaded in %.2f s: %d tokens%s%s",
                model.name,
                seconds,
                tokenizer.vocab_size,
                "" if tokenizer.has_chat_template else ", no chat template",
                "" if tokenizer.languages is None else f", {len(tokenizer.languages.targets)} target languages",
            )
        self._is_loaded = True

    def end_streams(self) -> None:
        """End every Detokenize stream with UNAVAILABLE, also those to come: they would never end by themselves."""
        self._is_stopping = True
        for task in self._streams:
            task.cancel()

    async def close(self) -> None:
        for grammars in self._grammars.values():
            await grammars.close()

    async def fill_ledger(self, reply: LedgerReply) -> None:
        reply.open_streams = len(self._streams)
        num_handles = sum(session.num_handles for session in self._sessions)
        reply.tokenizer.CopyFrom(TokenizerLedger(detokenize_handles=num_handles, models=self._tokenizers))

    async def Encode(self, request: tokenizer_pb2.EncodeRequest, context: Context) -> tokenizer_pb2.EncodeResponse:
        async def handler() -> tokenizer_pb2.EncodeResponse:
            tokenizer = self._tokenizer(request.model)
            add_special_tokens = request.add_special_tokens if request.HasField("add_special_tokens") else True
            return await self._in_thread(
                lambda: tokenizer_pb2.EncodeResponse(
                    outputs=[
                        types_pb2.TokensPrompt(ids=ids)
                        for ids in tokenizer.encode(request.texts, add_special_tokens=add_special_tokens)
                    ]
                )
            )

        return await rpc.answer(context, handler)  # type: ignore[no-any-return]

    async def EncodePair(
        self, request: tokenizer_pb2.EncodePairRequest, context: Context
    ) -> tokenizer_pb2.EncodePairResponse:
        async def handler() -> tokenizer_pb2.EncodePairResponse:
            tokenizer = self._tokenizer(request.model)
            texts = wire.pair_texts_from_proto(request)
            return wire.encoded_pair_to_proto(await self._in_thread(lambda: tokenizer.encode_pair(texts)))

        return await rpc.answer(context, handler)  # type: ignore[no-any-return]

    async def Render(self, request: tokenizer_pb2.RenderRequest, context: Context) -> tokenizer_pb2.RenderResponse:
        async def handler() -> tokenizer_pb2.RenderResponse:
            tokenizer, limit = self._tokenizer(request.model), TimeLimit(chat_template.MAX_RENDER_CPU_S)
            rendering = asyncio.ensure_future(self._in_thread(lambda: _render(tokenizer, request, limit)))
            try:
                wait_s = chat_template.MAX_RENDER_CPU_S
                while not (await asyncio.wait((rendering,), timeout=wait_s))[0]:
                    wait_s = limit.check()
                ids = rendering.result()
            except TimeLimitExceededError:
                logger.warning("the chat template of %s took longer than it may", request.model)
                raise chat_template.template_error() from None
            finally:
                rendering.cancel()
                limit.stop()
            return wire.rendered_to_proto(ids)

        return await rpc.answer(context, handler)  # type: ignore[no-any-return]

    async def CheckGrammar(
        self, request: tokenizer_pb2.CheckGrammarRequest, context: Context
    ) -> tokenizer_pb2.CheckGrammarResponse:
        async def handler() -> tokenizer_pb2.CheckGrammarResponse:
            self._tokenizer(request.model)
            await self._grammars[request.model].check(wire.structured_outputs_from_proto(request.structured_outputs))
            return tokenizer_pb2.CheckGrammarResponse()

        return await rpc.answer(context, handler)  # type: ignore[no-any-return]

    async def GetTokens(
        self, request: tokenizer_pb2.GetTokensRequest, context: Context
    ) -> tokenizer_pb2.GetTokensResponse:
        async def handler() -> tokenizer_pb2.GetTokensResponse:
            tokenizer = self._tokenizer(request.model)
            if len(request.ids) > MAX_TOKENS:
                raise InvalidRequestError(f"{len(request.ids)} ids, at most {MAX_TOKENS} are taken", param="ids")
            return await self._in_thread(
                lambda: tokenizer_pb2.GetTokensResponse(
                    tokens=[
                        tokenizer_pb2.TokenText(text=token.text, raw=token.raw, is_special=token.is_special)
                        for token in tokenizer.token_texts(request.ids)
                    ]
                )
            )

        return await rpc.answer(context, handler)  # type: ignore[no-any-return]

    async def Decode(self, request: tokenizer_pb2.DecodeRequest, context: Context) -> tokenizer_pb2.DecodeResponse:
        async def handler() -> tokenizer_pb2.DecodeResponse:
            tokenizer = self._tokenizer(request.model)
            if len(request.ids) > MAX_DECODED_IDS:
                raise InvalidRequestError(f"{len(request.ids)} ids, at most {MAX_DECODED_IDS} are taken", param="ids")
            skip = request.skip_special_tokens
            text = await self._in_thread(lambda: tokenizer.decode(request.ids, skip_special_tokens=skip))
            return tokenizer_pb2.DecodeResponse(text=text)

        return await rpc.answer(context, handler)  # type: ignore[no-any-return]

    async def Detokenize(
        self, request_iterator: AsyncIterator[tokenizer_pb2.DetokenizeCommand], context: Context
    ) -> None:
        await rpc.start_stream(context)
        if self._is_stopping:
            await rpc.abort_with(context, EngineUnavailableError("the service is shutting down", code="draining"))
        task = asyncio.current_task()
        assert task is not None, "a handler runs in a task"
        self._streams.add(task)
        try:
            await rpc.answer(context, lambda: self._detokenize(request_iterator, context))
        finally:
            self._streams.discard(task)

    async def _detokenize(self, commands: AsyncIterator[tokenizer_pb2.DetokenizeCommand], context: Context) -> None:
        first = await anext(commands, None)
        if first is None:
            return
        if first.WhichOneof("command") != "hello":
            raise _out_of_order(first)
        session = DetokenizeSession(self._tokenizer(first.hello.model))
        self._sessions.add(session)
        try:
            welcome = tokenizer_pb2.DetokenizeWelcome(tokenizer_epoch=self._epoch)
            await context.write(tokenizer_pb2.DetokenizeEvent(welcome=welcome))
            async for command in commands:
                if command.WhichOneof("command") != "push":
                    raise _out_of_order(command)
                text = await self._apply(session, command.push)
                await context.write(tokenizer_pb2.DetokenizeEvent(text=text))
        finally:
            self._sessions.discard(session)

    async def _apply(
        self, session: DetokenizeSession, push: tokenizer_pb2.DetokenizePush
    ) -> tokenizer_pb2.DetokenizeText:
        if num_ids(push) <= MAX_INLINE_IDS:
            return session.apply(push)
        return await asyncio.get_running_loop().run_in_executor(self._pool, session.apply, push)

    def _tokenizer(self, model: str) -> Tokenizer:
        tokenizer = self._tokenizers.get(model)
        if tokenizer is not None:
            return tokenizer
        if not self._is_loaded:
            raise EngineUnavailableError("the tokenizer is starting", code="starting")
        raise ModelNotFoundError(f"the tokenizer does not serve model {model!r:.200}", param="model")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._num_waiting >= MAX_WAITING_CALLS:
            raise OverloadedError(f"{MAX_WAITING_CALLS} calls wait for the tokenizer")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._num_waiting -= 1


def _out_of_order(command: tokenizer_pb2.DetokenizeCommand) -> InvalidRequestError:
    kind = command.WhichOneof("command") or "an empty command"
    return InvalidRequestError(
        f"the stream must be one hello, then pushes; got {kind}", param="command", code="out_of_order"
    )


def _render(tokenizer: Tokenizer, request: tokenizer_pb2.RenderRequest, limit: TimeLimit) -> list[int]:
    """Token ids of a chat. Only the template is under `limit`: encoding is linear, and is one call into C."""
    continue_final_message = request.continue_final_message
    is_set = request.HasField("add_generation_prompt")
    messages = chat_template.parse_messages(request.messages_json)
    settings = {
        "tools": chat_template.parse_tools(request.tools_json),
        "add_generation_prompt": request.add_generation_prompt if is_set else not continue_final_message,
        "continue_final_message": continue_final_message,
        "template_kwargs": chat_template.parse_template_kwargs(request.template_kwargs_json),
    }
    return tokenizer.chat(messages, run=limit.run, **settings).token_ids
