"""gRPC in: `Generate`, `Session`, `GetModelInfo` and `GetLedger` of one model, translated to the EngineLoop."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from trivium import rpc, wire
from trivium.config import ModelInfo, SchedulerConfig
from trivium.errors import (
    EngineUnavailableError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    TriviumError,
)
from trivium.generation_defaults import default_max_tokens
from trivium.inputs import EncodedPrompt, GenerationRequest
from trivium.ledger import register_ledger
from trivium.params import SamplingParams
from trivium.pooling import check_embed
from trivium.prompt_sides import check_vocabulary
from trivium.prompt_truncation import Truncation
from trivium.prompts import encode_prompt
from trivium.sampling_tokens import check_sampling_tokens, complete_sampling, resolve_texts
from trivium.scheduler.detokenizer_client import GrpcDetokenizerClient
from trivium.scheduler.engine_loop import EngineLoop
from trivium.scheduler.executor_client import GrpcExecutorClient
from trivium.scheduler.ledger import scheduler_ledger
from trivium.scheduler.request_trace import TracedEngineLoop
from trivium.scheduler.session import Outbox, Session
from trivium.tokenizer_client import TokenizerClient
from trivium.v1 import scheduler_pb2, scheduler_pb2_grpc, tokenizer_pb2_grpc, types_pb2
from trivium.v1.ledger_pb2 import LedgerReply

logger = logging.getLogger(__name__)

SERVICE = "trivium.v1.Scheduler"
HEARTBEAT_S = 1.0
MAX_EMBEDS = 256  # calls that wait for the executor
MAX_LABEL_CHARS = 256  # request id, tenant, salt


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServicer):
    """Translates between `trivium.v1.Scheduler` and the EngineLoop. Owns no request state beyond open streams."""

    def __init__(
        self,
        model: str,
        loop: EngineLoop,
        tokenizer: TokenizerClient,
        epoch: int,
        executor: GrpcExecutorClient | None = None,
    ) -> None:
        self._executor = executor
        self._num_embeds = 0
        self._model = model
        self._loop = loop
        self._tokenizer = tokenizer
        self._epoch = epoch
        self._is_draining = asyncio.Event()
        self._num_sessions = 0
        self._num_generates = 0

    def drain(self) -> None:
        """End every open stream, so that the server can stop."""
        self._is_draining.set()

    async def fill_ledger(self, reply: LedgerReply) -> None:
        reply.open_streams = self._num_sessions + self._num_generates
        if self._loop.has_scheduler:
            reply.scheduler.CopyFrom(scheduler_ledger(self._loop.scheduler, sessions=self._num_sessions))

    async def GetModelInfo(self, request: scheduler_pb2.GetModelInfoRequest, context: Any) -> types_pb2.ModelInfo:
        async def handle() -> types_pb2.ModelInfo:
            return wire.model_info_to_proto(self._model_info())

        return await rpc.answer(context, handle)  # type: ignore[no-any-return]

    async def Embed(self, request: types_pb2.EmbedRequest, context: Any) -> types_pb2.EmbedResponse:
        async def handle() -> types_pb2.EmbedResponse:
            if request.model and request.model != self._model:
                raise ModelNotFoundError(f"the model {request.model!r:.80} is not served here", param="model")
            if self._executor is None or self._is_draining.is_set():
                raise EngineUnavailableError("vectors cannot be computed now", code="draining")
            if self._num_embeds >= MAX_EMBEDS:
                raise OverloadedError(f"{MAX_EMBEDS} calls wait for vectors")
            check_embed(*wire.embed_from_proto(request), self._model_info())
            self._num_embeds += 1
            try:
                return await self._executor.embed(request)
            finally:
                self._num_embeds -= 1

        return await rpc.answer(context, handle)  # type: ignore[no-any-return]

    async def Generate(
        self, message: scheduler_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[scheduler_pb2.GenerateResponse]:
        self._num_generates += 1
        try:
            request = await self._request_from(message)
            async for response in self._generate(request):
                yield response
        except TriviumError as error:
            await rpc.abort_with(context, error)
        except Exception:
            logger.exception("a stream failed")
            await rpc.abort_with(context, InternalError("internal error"))
        finally:
            self._num_generates -= 1

    async def Session(
        self, messages: AsyncIterator[scheduler_pb2.SessionCommand], context: Any
    ) -> AsyncIterator[scheduler_pb2.SessionEvent]:
        session = Session(self._loop, self._request_from)
        self._num_sessions += 1
        try:
            await session.check_hello(messages)
            welcome = scheduler_pb2.SessionWelcome(
                scheduler_epoch=self._epoch, model=wire.model_info_to_proto(self._model_info())
            )
            yield scheduler_pb2.SessionEvent(welcome=welcome)
            async with session.reading(messages):
                while not self._is_draining.is_set() and not session.has_ended:
                    rows, errors = await session.outbox.take(HEARTBEAT_S)
                    if rows or errors:
                        yield scheduler_pb2.SessionEvent(batch=wire.delta_batch_to_proto(rows, errors))
                    else:
                        yield scheduler_pb2.SessionEvent(heartbeat=scheduler_pb2.Heartbeat(scheduler_epoch=self._epoch))
        except TriviumError as error:
            await rpc.abort_with(context, error)
        except Exception:
            logger.exception("a stream failed")
            await rpc.abort_with(context, InternalError("internal error"))
        finally:
            self._num_sessions -= 1
            session.abort_all()

    async def _request_from(self, message: scheduler_pb2.GenerateRequest) -> GenerationRequest:
        """Validate `message`, tokenize its texts, draw a seed if it has none. Raises TriviumError."""
        for name in ("request_id", "tenant", "cache_salt", "adapter", "prompt_adapter"):
            if len(getattr(message, name)) > MAX_LABEL_CHARS:
                raise InvalidRequestError(f"{name} is too long", param=name, code="too_long")
        adapter, prompt_adapter = self._adapters_of(message)
        info = self._loop.model_info.limited_by(prompt_adapter)
        truncation = None
        if message.sampling.HasField("truncate_prompt_tokens"):
            truncation = Truncation(
                message.sampling.truncate_prompt_tokens,
                message.sampling.truncation_side or None,
                message.sampling.max_tokens or 1,
            )
        prompt = await encode_prompt(
            wire.prompt_from_proto(message.prompt), self._tokenizer, info, truncation=truncation
        )
        if message.sampling_is_complete:
            sampling = await resolve_texts(wire.sampling_params_from_proto(message.sampling), self._tokenizer)
            check_sampling_tokens(sampling, info)
        else:
            sampling = await self._complete(message, prompt, info)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        resume = wire.resume_from_proto(message)
        for choice in resume:
            check_vocabulary(choice.output_token_ids, self._loop.model_info, "resume")
        return GenerationRequest(
            request_id=message.request_id or f"gen-{secrets.token_hex(8)}",
            prompt=prompt,
            sampling=sampling,
            stream=message.stream,
            resume=resume,
            traceparent=message.traceparent,
            priority=message.priority,
            tenant=message.tenant,
            cache_salt=message.cache_salt,
            adapter=adapter,
            prompt_adapter=prompt_adapter,
        )

    def _adapters_of(self, message: scheduler_pb2.GenerateRequest) -> tuple[str, str]:
        """Names of LoRA adapter and soft prompt. Raises ModelNotFoundError for a `model` that is neither of them."""
        info, adapter, soft = self._loop.model_info, message.adapter, message.prompt_adapter
        if message.model and message.model != self._model:
            if message.model not in info.adapter_names or adapter not in ("", message.model):
                raise ModelNotFoundError(f"the model {message.model!r:.80} is not served here", param="model")
            adapter = message.model
        if info.find_prompt_adapter(adapter) is None:
            return adapter, soft
        if soft not in ("", adapter):
            raise InvalidRequestError(
                f"{adapter!r:.80} and {soft!r:.80} are both prompt adapters: give one", param="prompt_adapter"
            )
        return "", adapter

    async def _complete(
        self, message: scheduler_pb2.GenerateRequest, prompt: EncodedPrompt, info: ModelInfo
    ) -> SamplingParams:
        given = wire.sampling_fields_from_proto(message.sampling)
        resolved = await complete_sampling(
            given, prompt, info, self._tokenizer, fallback_max_tokens=default_max_tokens(info)
        )
        return resolved.sampling

    async def _generate(self, request: GenerationRequest) -> AsyncIterator[scheduler_pb2.GenerateResponse]:
        outbox = Outbox()
        keys = self._loop.submit(request, outbox, 0)
        try:
            accepted = scheduler_pb2.Accepted(
                prompt_token_ids=request.prompt.token_ids,
                encoder_prompt_token_ids=request.prompt.encoder_token_ids or (),
                scheduler_epoch=self._epoch,
            )
            yield scheduler_pb2.GenerateResponse(accepted=accepted)
            num_left = request.num_open_choices
            while num_left:
                rows, errors = await outbox.take(HEARTBEAT_S)
                if errors:
                    raise errors[0][1]
                for _, delta in rows:
                    num_left -= delta.finish_reason is not None
                    yield scheduler_pb2.GenerateResponse(delta=wire.delta_to_proto(delta))
                if num_left and self._is_draining.is_set():
                    raise EngineUnavailableError("the server is shutting down", code="draining")
        finally:
            self._loop.abort(keys)

    def _model_info(self) -> ModelInfo:
        return replace(self._loop.model_info, name=self._model)


async def serve(
    model: str, executor: str, tokenizer: str, listen: str, config: SchedulerConfig, stop: asyncio.Event
) -> None:
    """Serve `model` on `listen` until `stop` is set. Raises ConfigurationError, or what broke the engine."""
    epoch = rpc.new_epoch()
    server = rpc.Server(listen, (SERVICE,))
    channel = rpc.open_channel(tokenizer)
    ready = _ReadyRelay(server)
    executor_client = GrpcExecutorClient(executor, epoch)
    loop = TracedEngineLoop(
        executor_client,
        GrpcDetokenizerClient(tokenizer_pb2_grpc.TokenizerStub(channel), model),
        config,
        model=model,
        on_ready=ready.tell,
    )
    servicer = SchedulerServicer(model, loop, TokenizerClient(model, channel), epoch, executor_client)
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(servicer, server.grpc_server)

    async def fill_ledger(reply: LedgerReply) -> None:
        await servicer.fill_ledger(reply)
        executor_ledger = await executor_client.ledger()
        if executor_ledger is not None:
            reply.peers.append(executor_ledger)

    register_ledger(server, "scheduler", epoch, fill_ledger)
    await server.start()
    tasks = [asyncio.create_task(stop.wait()), asyncio.create_task(loop.run()), asyncio.create_task(ready.run())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        servicer.drain()
        await server.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await channel.close()


class _ReadyRelay:
    """Carries the engine's readiness to the server's health, in order."""

    def __init__(self, server: rpc.Server) -> None:
        self._server = server
        self._changes: asyncio.Queue[bool] = asyncio.Queue()

    def tell(self, ready: bool) -> None:
        self._changes.put_nowait(ready)

    async def run(self) -> None:
        while True:
            await self._server.set_ready(await self._changes.get())
