"""Vectors: what is asked for, and rows of floats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trivium import columns
from trivium.pooling import PoolingParams
from trivium.v1 import types_pb2


def embed_to_proto(model: str, prompts: Iterable[Sequence[int]], params: PoolingParams) -> types_pb2.EmbedRequest:
    return types_pb2.EmbedRequest(
        model=model,
        prompts=[types_pb2.TokenSequence(ids=ids) for ids in prompts],
        pooling_type=params.pooling_type or "",
        normalize=params.normalize,
    )


def embed_from_proto(message: types_pb2.EmbedRequest) -> tuple[list[tuple[int, ...]], PoolingParams]:
    """Raises InvalidRequestError."""
    prompts = [tuple(prompt.ids) for prompt in message.prompts]
    return prompts, PoolingParams(pooling_type=message.pooling_type or None, normalize=message.normalize)


def vectors_to_proto(vectors: Sequence[Sequence[float]]) -> types_pb2.EmbedResponse:
    """`vectors` of one length, at least one."""
    flat = (value for vector in vectors for value in vector)
    return types_pb2.EmbedResponse(hidden_size=len(vectors[0]), vectors=columns.pack_floats(flat))


def vectors_from_proto(message: types_pb2.EmbedResponse) -> list[Sequence[float]]:
    """Raises ColumnError."""
    flat, size = columns.unpack_floats(message.vectors), message.hidden_size
    if not size or len(flat) % size:
        raise columns.ColumnError(f"{len(flat)} values are no rows of {size}")
    return [flat[start : start + size] for start in range(0, len(flat), size)]
