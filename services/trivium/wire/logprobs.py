"""Log-probabilities of tokens, in every message that has some."""

from __future__ import annotations

from collections.abc import Iterable

from trivium import columns
from trivium.outputs import TokenLogprobs
from trivium.v1 import types_pb2


def logprobs_to_proto(values: Iterable[TokenLogprobs]) -> list[types_pb2.TokenLogprobs]:
    return [
        types_pb2.TokenLogprobs(
            logprob=value.logprob,
            rank=value.rank,
            top_ids=columns.pack(value.top_ids),
            top_logprobs=columns.pack_floats(value.top_logprobs),
        )
        for value in values
    ]


def logprobs_from_proto(messages: Iterable[types_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    """Raises ColumnError."""
    values = []
    for message in messages:
        top_ids, top_logprobs = columns.unpack(message.top_ids), columns.unpack_floats(message.top_logprobs)
        columns.check_same_length(top_ids=top_ids, top_logprobs=top_logprobs)
        values.append(TokenLogprobs(message.logprob, message.rank, tuple(top_ids), top_logprobs))
    return tuple(values)
