"""POST /tokenize and /detokenize, in vLLM's shapes, and GET /version.

A prompt of an encoder-decoder model is its encoder input. Of a chat the tokens are those that would be generated from.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import trivium
from trivium.chat_embeds import take_embeds
from trivium.engine import EngineClient
from trivium.errors import InvalidRequestError
from trivium.inputs import check_token_ids
from trivium.prompt_sides import check_vocabulary
from trivium_gateway.asgi import send_json
from trivium_gateway.errors import unsupported_parameter
from trivium_gateway.json_body import to_struct
from trivium_gateway.messages import check_messages, is_continuation
from trivium_gateway.openai_protocol import first_used
from trivium_gateway.request_reader import RequestReader
from trivium_gateway.routing import ModelRoutes
from trivium_gateway.sampling import check_template_fields
from trivium_gateway.tools import shown_tools

_UNSUPPORTED: dict[str, tuple[object, ...]] = {"mm_processor_kwargs": (None, {}), "prompt_embeds": (None,)}


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`prompt` or `messages`. add_special_tokens: of a prompt, true by default; a chat template writes its own."""

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    """max_model_len: how many there may be, of an encoder-decoder model in the encoder. token_strs: their texts."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    tokens: Any = None
    skip_special_tokens: bool | None = None


class DetokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str


BodyT = TypeVar("BodyT", TokenizeRequest, DetokenizeRequest)


class _Requests:
    """What both endpoints read."""

    def __init__(self, routes: ModelRoutes, reader: RequestReader) -> None:
        self._routes = routes
        self._reader = reader

    async def read(self, kind: type[BodyT], scope: Scope, receive: Receive) -> tuple[BodyT, EngineClient]:
        """The body and the engine of its model; a server of one model needs no name."""
        fields = await self._reader.read(scope, receive)
        self._reader.check_known(fields, kind, _UNSUPPORTED)
        check_template_fields(fields)
        for name in first_used(fields, _UNSUPPORTED):
            raise unsupported_parameter(name)
        request = to_struct(fields, kind)
        names = self._routes.names()
        if request.model is None and len(names) != 1:
            raise InvalidRequestError("model is missing", param="model", code="missing_model")
        scope["trivium.model"] = self._routes.base_of(request.model or names[0])
        return request, self._routes.find(request.model or names[0])


class TokenizeEndpoint:
    """An ASGI application for POST /tokenize."""

    def __init__(self, routes: ModelRoutes, reader: RequestReader) -> None:
        self._requests = _Requests(routes, reader)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, engine = await self._requests.read(TokenizeRequest, scope, receive)
        info = engine.model_info
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequestError("give prompt or messages, one of them", param="prompt", code="missing_prompt")
        tokens = await (_of_prompt(request, engine) if request.messages is None else _of_chat(request, engine))
        strings = None
        if request.return_token_strs:
            texts = await engine.token_texts(tokens)
            strings = [texts[token_id].text for token_id in tokens]
        response = TokenizeResponse(
            count=len(tokens),
            max_model_len=info.max_encoder_len if info.is_encoder_decoder else info.max_model_len,
            tokens=tokens,
            token_strs=strings,
        )
        await send_json(send, msgspec.json.encode(response))


class DetokenizeEndpoint:
    """An ASGI application for POST /detokenize. Special tokens are shown unless `skip_special_tokens` is true."""

    def __init__(self, routes: ModelRoutes, reader: RequestReader) -> None:
        self._requests = _Requests(routes, reader)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, engine = await self._requests.read(DetokenizeRequest, scope, receive)
        if not isinstance(request.tokens, list):
            raise InvalidRequestError("tokens must be a list of token ids", param="tokens", code="invalid_token_id")
        tokens = check_token_ids(request.tokens, "tokens")
        check_vocabulary(tokens, engine.model_info, "tokens")
        text = await engine.decode(tokens, skip_special_tokens=bool(request.skip_special_tokens))
        await send_json(send, msgspec.json.encode(DetokenizeResponse(prompt=text)))


async def version(request: Request) -> Response:
    body = msgspec.json.encode({"version": trivium.__version__})
    return Response(body, media_type="application/json")


async def _of_prompt(request: TokenizeRequest, engine: EngineClient) -> list[int]:
    assert request.prompt is not None, "checked before"
    adds = request.add_special_tokens is not False
    return (await engine.encode([request.prompt], add_special_tokens=adds))[0]


async def _of_chat(request: TokenizeRequest, engine: EngineClient) -> list[int]:
    if request.add_special_tokens:
        raise unsupported_parameter("add_special_tokens")
    if engine.model_info.is_encoder_decoder:
        raise InvalidRequestError("an encoder-decoder model has no chat template: give prompt", param="messages")
    messages, embeds = take_embeds(check_messages(request.messages, takes_embeds=True))
    if embeds:
        param = embeds[0].param
        raise InvalidRequestError(f"{param}: embeddings have no token ids", param=param, code="invalid_prompt_embeds")
    continues = is_continuation(
        messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
    )
    return await engine.render(
        messages,
        tools=shown_tools(request.tools),
        add_generation_prompt=not continues if request.add_generation_prompt is None else request.add_generation_prompt,
        continue_final_message=continues,
        template_kwargs=request.chat_template_kwargs,
    )
