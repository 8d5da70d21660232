"""The scheduler's way to a detokenizer: one batch of ids out, one batch of texts back, per step."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from trivium import columns, rpc
from trivium.errors import EngineUnavailableError, InternalError, TriviumError
from trivium.v1 import tokenizer_pb2, tokenizer_pb2_grpc

logger = logging.getLogger(__name__)

SILENCE_S = 3600.0  # an idle stream is silent; a dead process breaks it, a hung one is found by keepalive
RECONNECT_S = 0.1


@dataclass(frozen=True, slots=True)
class OpenText:
    """A handle and how its text is made. `replay_ids` were turned into text before, `emitted_chars` of it delivered."""

    handle: int
    skip_special_tokens: bool
    stop: tuple[str, ...]
    include_stop_str_in_output: bool
    replay_ids: tuple[int, ...] = ()
    emitted_chars: int = 0


@dataclass(frozen=True, slots=True)
class TextRow:
    """New ids of one handle; `final` flushes and closes it."""

    handle: int
    token_ids: tuple[int, ...]
    final: bool


@dataclass(frozen=True, slots=True)
class TextPush:
    """What one step sends. Opens apply before rows; `closed_handles` are given up without text."""

    sequence: int
    opens: tuple[OpenText, ...]
    rows: tuple[TextRow, ...]
    closed_handles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StopHit:
    """A row completed stop string `stop_index`; the first `tokens_kept` ids of the handle belong to the output."""

    stop_index: int
    tokens_kept: int


@dataclass(frozen=True, slots=True)
class TextResult:
    """The answer to a push: `texts[i]` and maybe `stops[i]` belong to its row i."""

    sequence: int
    texts: tuple[str, ...]
    stops: dict[int, StopHit]  # row -> StopHit


class DetokenizerClient(Protocol):
    """Turns ids into text, batch by batch, in order."""

    def push(self, push: TextPush) -> None:
        """Queue `push`; never waits. Its result comes to `on_result`."""
        ...

    async def run(self, on_result: Callable[[TextResult], None], on_connect: Callable[[], None]) -> None:
        """Deliver results until cancelled.

        `on_connect` is called whenever a detokenizer without any handle stands ready, the first time included:
        pushes without a result are lost by then and have to be made again.
        """
        ...


class GrpcDetokenizerClient:
    """DetokenizerClient over one `Detokenize` stream, opened again when it breaks."""

    def __init__(self, stub: tokenizer_pb2_grpc.TokenizerStub, model: str) -> None:
        self._stub = stub
        self._model = model
        self._call: rpc.BidiCall[tokenizer_pb2.DetokenizeCommand, tokenizer_pb2.DetokenizeEvent] | None = None

    def push(self, push: TextPush) -> None:
        if self._call is not None:  # else lost, and made again after on_connect
            self._call.send(tokenizer_pb2.DetokenizeCommand(push=push_to_proto(push)))

    async def run(self, on_result: Callable[[TextResult], None], on_connect: Callable[[], None]) -> None:
        while True:
            call = rpc.BidiCall(self._stub.Detokenize(wait_for_ready=True), silence_s=SILENCE_S)
            try:
                call.send(tokenizer_pb2.DetokenizeCommand(hello=tokenizer_pb2.DetokenizeHello(model=self._model)))
                welcome = await call.receive()
                if welcome.WhichOneof("event") != "welcome":
                    raise InternalError("the tokenizer did not answer the hello")
                self._call = call
                on_connect()
                while True:
                    event = await call.receive()
                    on_result(result_from_proto(event.text))
            except EngineUnavailableError as error:
                logger.log(logging.INFO if self._call else logging.DEBUG, "no tokenizer: %s", error.message)
            except (TriviumError, columns.ColumnError) as error:
                logger.warning("the tokenizer's stream failed: %s", error)
            finally:
                self._call = None
                await call.close()
            await asyncio.sleep(RECONNECT_S)


def push_to_proto(push: TextPush) -> tokenizer_pb2.DetokenizePush:
    counts, ids = columns.pack_ragged([row.token_ids for row in push.rows])
    return tokenizer_pb2.DetokenizePush(
        sequence=push.sequence,
        opens=[
            tokenizer_pb2.DetokenizeOpen(
                handle=item.handle,
                skip_special_tokens=item.skip_special_tokens,
                stop=item.stop,
                include_stop_str_in_output=item.include_stop_str_in_output,
                replay_ids=columns.pack(item.replay_ids),
                emitted_chars=item.emitted_chars,
            )
            for item in push.opens
        ],
        handles=columns.pack(row.handle for row in push.rows),
        counts=counts,
        ids=ids,
        final=columns.pack((row.final for row in push.rows), "B"),
        closed_handles=columns.pack(push.closed_handles),
    )


def result_from_proto(message: tokenizer_pb2.DetokenizeText) -> TextResult:
    return TextResult(
        sequence=message.sequence,
        texts=tuple(message.texts),
        stops={hit.row: StopHit(hit.stop_index, hit.tokens_kept) for hit in message.stops},
    )
