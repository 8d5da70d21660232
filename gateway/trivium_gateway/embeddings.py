"""POST /v1/embeddings: texts or token ids in, one vector each out.

Vectors are hidden states of the model that generates: the last token's of a decoder-only model, the mean of the
encoder's output of an encoder-decoder model, unless `pooling_type` says otherwise; of length 1 unless `normalize` is
false.
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from starlette.types import Receive, Scope, Send

from trivium import columns
from trivium.engine import EngineClient
from trivium.errors import InvalidRequestError
from trivium.params import check_int
from trivium.pooling import PoolingParams, PoolingType, check_pooled_length, packs
from trivium.prompt_truncation import Truncation
from trivium_gateway.asgi import send_json, watch_disconnect
from trivium_gateway.concurrency import run_all
from trivium_gateway.drain import Drain
from trivium_gateway.errors import unsupported_parameter
from trivium_gateway.json_body import to_struct
from trivium_gateway.openai_protocol import first_used
from trivium_gateway.prompts import encode_prompts, inputs
from trivium_gateway.request_reader import RequestReader
from trivium_gateway.routing import ModelRoutes
from trivium_gateway.usage import EmbeddingUsage

MAX_INPUTS = 2048
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "dimensions": (None,),
    "priority": (None, 0),
    "add_special_tokens": (None, True),
    "messages": (None,),
}


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`pooling_type` and `normalize` are those of PoolingParams, `truncate_prompt_tokens` that of completions."""

    model: str | None = None
    input: Any = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    pooling_type: str | None = None
    normalize: bool = True
    truncate_prompt_tokens: int | None = None


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """embedding: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Sequence[float] | str


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class EmbeddingsEndpoint:
    """An ASGI application for POST /v1/embeddings."""

    def __init__(self, routes: ModelRoutes, reader: RequestReader, drain: Drain) -> None:
        self._routes = routes
        self._reader = reader
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = await self._reader.read(scope, receive)
        self._reader.check_known(fields, EmbeddingRequest, _UNSUPPORTED)
        for name in first_used(fields, _UNSUPPORTED):
            raise unsupported_parameter(name)
        request = to_struct({name: value for name, value in fields.items() if value is not None}, EmbeddingRequest)
        if request.model is None:
            raise InvalidRequestError("model is missing", param="model", code="missing_model")
        scope["trivium.model"] = self._routes.base_of(request.model)
        engine = self._routes.find(request.model)
        if self._routes.adapter_of(request.model):
            raise InvalidRequestError("vectors are of the base model, not of an adapter", param="model")
        params = _params(request)
        prompts = await _token_ids(request, engine)
        watchers = [watch_disconnect(receive), self._drain.watch()]
        (vectors,) = await run_all([_vectors(prompts, params, engine)], beside=watchers)
        encode = _base64 if request.encoding_format == "base64" else _numbers
        num_tokens = sum(map(len, prompts))
        response = EmbeddingList(
            id=f"embd-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            data=[Embedding(index=index, embedding=encode(vector)) for index, vector in enumerate(vectors)],
            usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
        )
        await send_json(send, msgspec.json.encode(response))


def _params(request: EmbeddingRequest) -> PoolingParams:
    if request.pooling_type == PoolingType.ALL:
        raise InvalidRequestError("pooling_type must be last, mean or cls", param="pooling_type")
    if request.truncate_prompt_tokens not in (None, -1):
        check_int("truncate_prompt_tokens", request.truncate_prompt_tokens, 1, 2**24)
    return PoolingParams(pooling_type=request.pooling_type, normalize=request.normalize)


async def _token_ids(request: EmbeddingRequest, engine: EngineClient) -> list[tuple[int, ...]]:
    """Of every input; each fits the model."""
    info, wanted = engine.model_info, request.truncate_prompt_tokens
    if request.input is None:
        raise InvalidRequestError("input is missing", param="input", code="missing_input")
    placed = inputs(request.input, "input", info, is_cut=wanted is not None, max_inputs=MAX_INPUTS)
    truncation = None if wanted is None else Truncation(wanted, num_reserved=0)
    prompts = []
    for place, encoded in zip(placed, await encode_prompts(placed, engine, info, truncation), strict=True):
        ids = encoded.token_ids if encoded.encoder_token_ids is None else encoded.encoder_token_ids
        check_pooled_length(len(ids), info, place.param)
        prompts.append(ids)
    return prompts


async def _vectors(
    prompts: Sequence[tuple[int, ...]], params: PoolingParams, engine: EngineClient
) -> list[Sequence[float]]:
    """Pack by pack, so that other requests get their turns in between."""
    vectors: list[Sequence[float]] = []
    for pack in packs(prompts, engine.model_info.max_num_batched_tokens):
        vectors += await engine.embed(pack, params)
    return vectors


def _numbers(vector: Sequence[float]) -> Sequence[float]:
    return vector


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(columns.pack_floats(vector)).decode()
