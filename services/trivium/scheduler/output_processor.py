"""From sampled tokens to what clients are told: decides what needs text, pairs texts with their tokens, delivers.

Owns the delivery state of every choice. Knows nothing of blocks, plans or gRPC. Order of effects for one step:
`add` each update, then `flush` sends one push to the detokenizer; `on_text_result` delivers what that push made.

A choice that is not streamed and has no stop strings is detokenized once, at its end.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from trivium.errors import TriviumError
from trivium.outputs import ChoiceDelta, FinishReason, TokenLogprobs
from trivium.scheduler.detokenizer_client import DetokenizerClient, OpenText, StopHit, TextPush, TextResult, TextRow
from trivium.scheduler.request import Request

logger = logging.getLogger(__name__)


class DeltaSink(Protocol):
    """Where a client's deltas go. Delivery never waits; what is held is bounded by the output itself."""

    def deliver(self, handle: int, delta: ChoiceDelta) -> None: ...

    def fail(self, handle: int, error: TriviumError) -> None: ...


@dataclass(slots=True, eq=False)
class OutputStream:
    """Delivery state of one choice. Owner: OutputProcessor.

    New ids wait in `unpushed` for a push and in `unsent` for the text of that push. The detokenizer has answered for
    the first `num_answered_ids` ids of the output; `num_chars` is the length of the text that it has made of them.
    `logprobs` wait for their ids, which are delivered in order: the first of them is of the next id to be delivered.
    has_begun: the client has something of the choice.
    """

    request: Request
    sink: DeltaSink
    handle: int
    stream: bool
    num_answered_ids: int = 0
    num_chars: int = 0
    unpushed: list[int] = field(default_factory=list)
    unsent: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    has_begun: bool = False
    text: str = ""
    is_open: bool = False
    is_closed: bool = False

    @property
    def needs_text_each_step(self) -> bool:
        return self.stream or bool(self.request.sampling.stop)


@dataclass(frozen=True, slots=True)
class _PushInFlight:
    sequence: int
    rows: tuple[tuple[OutputStream, TextRow], ...]


class OutputProcessor:
    """Owner of all OutputStreams. `on_stop_string` is told of a request whose text met a stop string."""

    def __init__(self, detokenizer: DetokenizerClient, on_stop_string: Callable[[Request], None]) -> None:
        self._detokenizer = detokenizer
        self._on_stop_string = on_stop_string
        self._streams: dict[int, OutputStream] = {}  # request key -> OutputStream
        self._dirty: dict[int, OutputStream] = {}  # those with something to push in this step
        self._closed_handles: list[int] = []
        self._in_flight: deque[_PushInFlight] = deque()
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def num_embeds_bytes(self) -> int:
        """Of the prompt embeddings of all requests; the choices of one share them."""
        requests = [stream.request for stream in self._streams.values()]
        embeds = [part for request in requests for part in (request.embeds, request.encoder_embeds) if part is not None]
        return sum({id(part): len(part.data) for part in embeds}.values())

    def request_of(self, key: int) -> Request | None:
        """The request with this key, if anything is still to be delivered for it."""
        stream = self._streams.get(key)
        return None if stream is None else stream.request

    def open(self, stream: OutputStream, *, emitted_chars: int) -> None:
        """Start to deliver for a request. Its present output is resumed: the client has it, with `emitted_chars`."""
        stream.num_answered_ids = len(stream.request.output_token_ids)
        stream.num_chars = emitted_chars
        stream.has_begun = bool(stream.num_answered_ids or emitted_chars)
        self._streams[stream.request.key] = stream
        if stream.request.is_finished:
            self._dirty[stream.request.key] = stream

    def close(self, request: Request) -> None:
        """Deliver nothing more for `request`: its client is gone."""
        stream = self._streams.pop(request.key, None)
        self._dirty.pop(request.key, None)
        if stream is not None:
            stream.is_closed = True
            if stream.is_open:
                self._closed_handles.append(request.key)

    def add(self, request: Request, new_token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] = ()) -> None:
        """New output of `request`, whose `finish_reason` is set if these are the last.

        logprobs: one for each new id, or none.
        """
        stream = self._streams.get(request.key)
        if stream is None:
            return
        stream.unpushed.extend(new_token_ids)
        if logprobs:
            stream.logprobs.extend(logprobs)
        if not request.sampling.detokenize:
            self._deliver_tokens(stream)
        elif stream.needs_text_each_step or request.is_finished:
            self._dirty[request.key] = stream

    def flush(self) -> None:
        """Send what `add` and `close` collected, as one push."""
        if not self._dirty and not self._closed_handles:
            return
        opens, rows = [], []
        for stream in self._dirty.values():
            if not stream.is_open:
                opens.append(self._open_text(stream))
                stream.is_open = True
            row = TextRow(stream.request.key, self._text_ids(stream), final=stream.request.is_finished)
            rows.append((stream, row))
            stream.unsent.extend(stream.unpushed)
            stream.unpushed.clear()
        self._dirty.clear()
        closed, self._closed_handles = tuple(self._closed_handles), []
        self._push(tuple(opens), tuple(rows), closed)

    def on_text_result(self, result: TextResult) -> None:
        """Pair the texts of the oldest push with its rows and deliver."""
        push = self._in_flight.popleft()
        assert push.sequence == result.sequence, f"text {result.sequence}, expected {push.sequence}"
        for index, ((stream, row), text) in enumerate(zip(push.rows, result.texts, strict=True)):
            if stream.is_closed:
                continue
            stream.text += text
            stream.num_chars += len(text)
            stream.num_answered_ids += len(row.token_ids)
            hit = result.stops.get(index)
            if hit is not None:
                self._end_by_stop_string(stream, hit)
            elif row.final:
                self._deliver(stream, self._ids_of(stream, row), stream.request.finish_reason)
            elif stream.stream:
                self._deliver(stream, self._ids_of(stream, row), None)

    def on_connect(self) -> None:
        """A detokenizer without handles: open what was open again, replaying what it had answered for."""
        pushes, self._in_flight = self._in_flight, deque()
        lost: dict[int, tuple[OutputStream, TextRow]] = {}  # request key -> all its rows without an answer, as one
        for push in pushes:
            for stream, row in push.rows:
                before = lost[row.handle][1].token_ids if row.handle in lost else ()
                lost[row.handle] = stream, TextRow(row.handle, before + row.token_ids, row.final)
        opens = tuple(self._open_text(stream) for stream in self._streams.values() if stream.is_open)
        rows = tuple((stream, row) for stream, row in lost.values() if not stream.is_closed)
        self._closed_handles.clear()
        if opens:
            self._push(opens, rows, ())

    def fail(self, request: Request, error: TriviumError) -> list[Request]:
        """Deliver `error` as the end of the client request that `request` is a choice of, and nothing more for it.

        All its choices that had not ended; they have to be finished.
        """
        failed = self._streams[request.key]
        choices = [
            stream.request
            for stream in self._streams.values()
            if stream.sink is failed.sink and stream.handle == failed.handle
        ]
        for choice in choices:
            self.close(choice)
        failed.sink.fail(failed.handle, error)
        return choices

    def fail_all(self, error: TriviumError) -> None:
        while self._streams:
            self.fail(next(iter(self._streams.values())).request, error)

    def _push(
        self,
        opens: tuple[OpenText, ...],
        rows: tuple[tuple[OutputStream, TextRow], ...],
        closed: tuple[int, ...],
    ) -> None:
        self._sequence += 1
        self._in_flight.append(_PushInFlight(self._sequence, rows))
        self._detokenizer.push(TextPush(self._sequence, opens, tuple(row for _, row in rows), closed))

    def _open_text(self, stream: OutputStream) -> OpenText:
        sampling = stream.request.sampling
        return OpenText(
            handle=stream.request.key,
            skip_special_tokens=sampling.skip_special_tokens,
            stop=sampling.stop,
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            replay_ids=tuple(stream.request.output_token_ids[: stream.num_answered_ids]),
            emitted_chars=stream.num_chars,
        )

    @staticmethod
    def _text_ids(stream: OutputStream) -> tuple[int, ...]:
        """The ids to make text of: not the token that ended the choice, unless the caller wants to see it."""
        request = stream.request
        ids = stream.unpushed
        ended_by_token = request.finish_reason is FinishReason.STOP and ids and not request.ends_in_text
        if ended_by_token and not request.sampling.include_stop_str_in_output:
            return tuple(ids[:-1])
        return tuple(ids)

    @staticmethod
    def _ids_of(stream: OutputStream, row: TextRow) -> tuple[int, ...]:
        """Take the ids that belong to an answered row out of `unsent`: all, once the row is the last."""
        count = len(stream.unsent) if row.final or not stream.stream else len(row.token_ids)
        ids = tuple(stream.unsent[:count])
        del stream.unsent[:count]
        return ids

    def _end_by_stop_string(self, stream: OutputStream, hit: StopHit) -> None:
        num_delivered = len(stream.request.output_token_ids) - len(stream.unpushed) - len(stream.unsent)
        ids = tuple(stream.unsent[: hit.tokens_kept - num_delivered])
        self._closed_handles.append(stream.request.key)
        self._on_stop_string(stream.request)
        self._deliver(stream, ids, FinishReason.STOP, stream.request.sampling.stop[hit.stop_index])

    def _deliver_tokens(self, stream: OutputStream) -> None:
        """Deliver a choice that wants no text: at once if streamed, else at its end."""
        if stream.stream or stream.request.is_finished:
            ids = tuple(stream.unpushed)
            stream.unpushed.clear()
            self._deliver(stream, ids, stream.request.finish_reason)

    def _deliver(
        self,
        stream: OutputStream,
        ids: tuple[int, ...],
        finish_reason: FinishReason | None,
        stop_string: str | None = None,
    ) -> None:
        request = stream.request
        text, stream.text = stream.text, ""
        stop_reason = stop_string if stop_string is not None else request.stop_reason
        logprobs = self._take_logprobs(stream, len(ids)) if stream.logprobs else ()
        if finish_reason is not None:
            self._streams.pop(request.key, None)
            stream.is_closed = True
        elif ids or text:
            stop_reason = None
        else:
            return
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        num_cached_tokens = None
        if not stream.has_begun:
            stream.has_begun = True
            if request.wants_prompt_logprobs:
                prompt_logprobs = tuple(request.prompt_logprobs[request.num_virtual_tokens :])
            if request.choice_index == 0:
                num_cached_tokens = request.num_cached_tokens
        stream.sink.deliver(
            stream.handle,
            ChoiceDelta(
                request.choice_index,
                ids,
                text,
                finish_reason,
                stop_reason,
                logprobs,
                prompt_logprobs,
                None if finish_reason is None else request.cumulative_logprob,
                num_cached_tokens,
            ),
        )

    @staticmethod
    def _take_logprobs(stream: OutputStream, count: int) -> tuple[TokenLogprobs, ...]:
        logprobs = tuple(stream.logprobs[:count])
        del stream.logprobs[:count]
        return logprobs
