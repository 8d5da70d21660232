"""One Detokenize stream: its handles, and the answer to each push. Pure: no gRPC call happens here.

Order of side effects within a push: opens, then rows from first to last, then closed handles. A handle that is to be
reused must therefore be closed in an earlier push than the one that opens it again.

    open      takes rows
    stopped   a stop string ended it, but the sender may not know yet: its rows are ignored until the sender closes it
              or opens it again
    closed    by a final row or by closed_handles; closing it again does nothing, a row for it is an error
"""

from __future__ import annotations

from trivium import columns
from trivium.errors import InvalidRequestError
from trivium.params import MAX_STOP, MAX_STOP_CHARS
from trivium.tokenizer.detokenizer import IncrementalDetokenizer, StopMatch
from trivium.tokenizer.tokenizer import Tokenizer
from trivium.v1 import tokenizer_pb2

MAX_OPEN_HANDLES = 65_536
MAX_STOPPED_HANDLES = 65_536  # the oldest are forgotten first; their tokens in flight have long arrived


class DetokenizeSession:
    """The state of one stream, owned by the handler that reads it. It dies with the stream."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._open: dict[int, IncrementalDetokenizer] = {}  # handle -> its stream
        self._stopped: dict[int, None] = {}  # handles in the order in which they stopped

    @property
    def num_handles(self) -> int:
        """Handles that the sender has not closed, stopped ones included."""
        return len(self._open) + len(self._stopped)

    def apply(self, push: tokenizer_pb2.DetokenizePush) -> tokenizer_pb2.DetokenizeText:
        """The answer to `push`.

        Raises InvalidRequestError for malformed columns, a row of a handle that is not open, and a handle opened
        twice. The session must not be used after that.
        """
        try:
            rows = _unpack_rows(push)
            closed = columns.unpack(push.closed_handles)
            for message in push.opens:
                self._open_handle(message)
        except columns.ColumnError as error:
            raise InvalidRequestError(str(error), code="malformed_columns") from None
        answer = tokenizer_pb2.DetokenizeText(sequence=push.sequence)
        for row, (handle, token_ids, final) in enumerate(rows):
            text, match = self._push_row(handle, token_ids, final=final)
            answer.texts.append(text)
            if match is not None:
                answer.stops.add(row=row, stop_index=match.stop_index, tokens_kept=match.tokens_kept)
        for handle in closed:
            self._open.pop(handle, None)
            self._stopped.pop(handle, None)
        return answer

    def check_invariants(self) -> None:
        """Assert that no handle is in two states and that the bounds hold."""
        assert self._open.keys().isdisjoint(self._stopped), "a handle is open and stopped"
        assert len(self._open) <= MAX_OPEN_HANDLES, "too many open handles"
        assert len(self._stopped) <= MAX_STOPPED_HANDLES, "too many stopped handles"

    def _open_handle(self, message: tokenizer_pb2.DetokenizeOpen) -> None:
        handle = message.handle
        if handle in self._open:
            raise InvalidRequestError(f"handle {handle} is open already", param="opens", code="handle_in_use")
        if len(self._open) >= MAX_OPEN_HANDLES:
            raise InvalidRequestError(f"more than {MAX_OPEN_HANDLES} open handles", param="opens")
        if len(message.stop) > MAX_STOP or not all(1 <= len(text) <= MAX_STOP_CHARS for text in message.stop):
            raise InvalidRequestError(
                f"handle {handle} may have {MAX_STOP} stop strings of 1 to {MAX_STOP_CHARS} characters",
                param="opens",
                code="invalid_stop",
            )
        detokenizer = self._tokenizer.detokenizer(
            skip_special_tokens=message.skip_special_tokens,
            stop=message.stop,
            include_stop_str_in_output=message.include_stop_str_in_output,
        )
        if message.replay_ids or message.emitted_chars:
            detokenizer.replay(columns.unpack(message.replay_ids), message.emitted_chars)
        self._stopped.pop(handle, None)
        self._open[handle] = detokenizer

    def _push_row(self, handle: int, token_ids: tuple[int, ...], *, final: bool) -> tuple[str, StopMatch | None]:
        if handle in self._stopped:
            if final:
                del self._stopped[handle]
            return "", None
        detokenizer = self._open.get(handle)
        if detokenizer is None:
            raise InvalidRequestError(f"handle {handle} is not open", param="handles", code="unknown_handle")
        text, match = detokenizer.push(token_ids, final=final)
        if final or match is not None:
            del self._open[handle]
        if match is not None and not final:
            self._remember_stopped(handle)
        return text, match

    def _remember_stopped(self, handle: int) -> None:
        if len(self._stopped) >= MAX_STOPPED_HANDLES:
            del self._stopped[next(iter(self._stopped))]
        self._stopped[handle] = None


def num_ids(push: tokenizer_pb2.DetokenizePush) -> int:
    """How many ids `push` carries, replayed ones included: what it costs."""
    return (len(push.ids) + sum(len(message.replay_ids) for message in push.opens)) // 4


def _unpack_rows(push: tokenizer_pb2.DetokenizePush) -> list[tuple[int, tuple[int, ...], bool]]:
    handles, final = columns.unpack(push.handles), columns.unpack(push.final, "B")
    ids = columns.unpack_ragged(push.counts, push.ids)
    columns.check_same_length(handles=handles, counts=ids, final=final)
    if any(flag > 1 for flag in final):
        raise columns.ColumnError("a value in final is neither 0 nor 1")
    return [(handle, row_ids, bool(flag)) for handle, row_ids, flag in zip(handles, ids, final, strict=True)]
