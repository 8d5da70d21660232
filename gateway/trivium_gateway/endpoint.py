"""What the generating endpoints share: from the request bytes to a running generation to the response.

`GenerationEndpoint.__call__` is the life of one call. The endpoints differ in how they read a prompt and in how
they write choices; those are the methods that they implement.
"""

from __future__ import annotations

import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from opentelemetry.trace import Span
from starlette.types import Receive, Scope, Send

from trivium.config import ModelInfo
from trivium.engine import EngineClient
from trivium.errors import InvalidRequestError
from trivium.inputs import EncodedPrompt, GenerationRequest
from trivium.params import SamplingParams
from trivium.telemetry import current_traceparent
from trivium_gateway.asgi import MAX_BODY_BYTES, MAX_EMBEDS_BODY_BYTES, send_json, watch_disconnect
from trivium_gateway.auth import tenant_of
from trivium_gateway.drain import Drain
from trivium_gateway.generation import ChoiceCollector, Generation, run_generation
from trivium_gateway.json_body import to_struct
from trivium_gateway.logprobs import LogprobsForm, TokenTexts
from trivium_gateway.metrics import GatewayMetrics
from trivium_gateway.openai_protocol import GenerationFields
from trivium_gateway.request_reader import RequestReader
from trivium_gateway.routing import ModelRoutes
from trivium_gateway.sampling import as_given, check_fields, resolve_aliases
from trivium_gateway.stream_extras import StreamExtras
from trivium_gateway.streaming import ChunkEncoder, stream_generation
from trivium_gateway.tool_calls import ToolReading
from trivium_gateway.tracing import call_span, describe_call
from trivium_gateway.usage import Usage

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=GenerationFields)


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt with the parameters that fit it, and which of them come from the checkpoint."""

    prompt: EncodedPrompt
    sampling: SamplingParams
    applied_defaults: Mapping[str, Any] = field(default_factory=dict)


class GenerationEndpoint(ABC, Generic[RequestT]):
    """An ASGI application for one POST route. Holds no state of its own."""

    request_type: ClassVar[type[GenerationFields]]
    unsupported: ClassVar[dict[str, tuple[object, ...]]]  # field -> values that mean "not used"
    id_prefix: ClassVar[str]
    operation: ClassVar[str]  # as the GenAI conventions of OpenTelemetry call it

    def __init__(
        self,
        routes: ModelRoutes,
        reader: RequestReader,
        drain: Drain,
        metrics: GatewayMetrics,
        *,
        enable_prompt_embeds: bool = False,
        tool_parsers: Mapping[str, str] | None = None,
    ) -> None:
        self._enable_prompt_embeds = enable_prompt_embeds
        self._tool_parsers = tool_parsers or {}  # served name -> parser of calls; "" is of all other models
        self._routes = routes
        self._reader = reader
        self._drain = drain
        self._metrics = metrics

    @abstractmethod
    async def jobs(self, request: RequestT, engine: EngineClient, info: ModelInfo) -> list[Job]:
        """The prompts of `request`, encoded and checked. Raises TriviumError."""

    @abstractmethod
    def logprobs_form(self, request: RequestT) -> LogprobsForm:
        """What `request` wants to see of log-probabilities. Raises InvalidRequestError."""

    def reading(self, request: RequestT) -> ToolReading | None:
        """How calls are read out of the texts. `request` was checked."""
        return None

    @abstractmethod
    def response(self, generation: Generation, collected: ChoiceCollector, usage: Usage) -> msgspec.Struct:
        """The response to a complete call."""

    @abstractmethod
    def encoder(self, generation: Generation, extras: StreamExtras) -> ChunkEncoder:
        """The form of the events of a stream."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with call_span(self.operation, scope) as span:
            await self._answer(span, scope, receive, send)

    async def _answer(self, span: Span, scope: Scope, receive: Receive, send: Send) -> None:
        began_s = time.monotonic()
        max_bytes = MAX_EMBEDS_BODY_BYTES if self._enable_prompt_embeds else MAX_BODY_BYTES
        fields = await self._reader.read(scope, receive, max_bytes=max_bytes)
        request = self._checked(fields)
        scope["trivium.model"] = self._routes.base_of(request.model or "")
        tenant = tenant_of(request.user, scope["headers"])
        generation = await self._generation(request, began_s, tenant)
        describe_call(span, self.operation, generation, scope["trivium.request_id"])
        logger.info(
            "%s: is %s, model %s, %d prompts, n=%d, stream=%s",
            scope["trivium.request_id"],
            generation.id,
            generation.model,
            len(generation.requests),
            generation.n,
            bool(request.stream),
        )
        if request.stream:
            encoder = self.encoder(generation, StreamExtras.of(request, generation))
            await stream_generation(generation, encoder, receive=receive, send=send, drain=self._drain)
        else:
            await self._send_whole(generation, receive, send)

    def _checked(self, fields: dict[str, Any]) -> RequestT:
        self._reader.check_known(fields, self.request_type, self.unsupported)
        if fields.get("model") is None:
            raise InvalidRequestError("model is missing", param="model", code="missing_model")
        if fields.get("prompt_embeds") is not None and not self._enable_prompt_embeds:
            raise InvalidRequestError("prompt_embeds is not enabled", param="prompt_embeds", code="feature_disabled")
        request: Any = resolve_aliases(to_struct(fields, self.request_type))
        check_fields(fields, request, self.unsupported)
        checked: RequestT = request
        return checked

    async def _generation(self, request: RequestT, began_s: float, tenant: str) -> Generation:
        assert request.model is not None, "checked before"
        engine = self._routes.find(request.model)
        generation_id = f"{self.id_prefix}-{request.request_id or uuid.uuid4().hex}"
        adapter = self._routes.adapter_of(request.model)
        info = engine.model_info.limited_by(adapter)
        is_soft = info.find_prompt_adapter(adapter) is not None
        try:
            jobs = await self.jobs(request, engine, info)
        except InvalidRequestError as error:
            raise as_given(error, request) from None
        traceparent = current_traceparent()
        requests = tuple(
            GenerationRequest(
                request_id=generation_id if len(jobs) == 1 else f"{generation_id}-{position}",
                prompt=job.prompt,
                sampling=job.sampling,
                stream=bool(request.stream),
                traceparent=traceparent,
                adapter="" if is_soft else adapter,
                prompt_adapter=adapter if is_soft else "",
                priority=request.priority or 0,
                tenant=tenant,
                cache_salt=request.cache_salt or "",
            )
            for position, job in enumerate(jobs)
        )
        return Generation(
            id=generation_id,
            created=int(time.time()),
            model=request.model,
            engine=engine,
            requests=requests,
            metrics=self._metrics.models[self._routes.base_of(request.model)],
            began_s=began_s,
            logprobs=self.logprobs_form(request),
            token_texts=TokenTexts(engine),
            returns_token_ids=bool(request.return_token_ids),
            applied_defaults=jobs[0].applied_defaults if request.debug else None,
            reading=self.reading(request),
        )

    async def _send_whole(self, generation: Generation, receive: Receive, send: Send) -> None:
        collector = ChoiceCollector(generation.num_choices)
        await run_generation(generation, collector, watch_disconnect(receive), self._drain.watch())
        response = self.response(generation, collector, generation.usage(collector.counts))
        if generation.applied_defaults is not None:
            response = msgspec.structs.replace(response, applied_defaults=dict(generation.applied_defaults))
        await send_json(send, msgspec.json.encode(response))
