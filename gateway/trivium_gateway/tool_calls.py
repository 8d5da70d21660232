"""Tool calls in responses: what a choice's text is read as, and how its calls are written, whole and in pieces."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType

from trivium_gateway.openai_protocol import DeltaToolCall, FinishName, FunctionCall, ToolCall
from trivium_gateway.tool_parsers.events import CallArguments, CallStart, Content, ToolEvent, ToolParser
from trivium_gateway.tool_parsers.hermes import HermesParser
from trivium_gateway.tool_parsers.llama3_json import Llama3JsonParser
from trivium_gateway.tool_parsers.mistral import MistralParser
from trivium_gateway.tool_parsers.pythonic import PythonicParser

_PIECE_CHARS = 1024  # fed at once: a parser may look at, and move, all that it was fed with each step
_SHORT_ID_CHARS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolReading:
    """How the text of each choice of a call is read.

    shows_special: the marks of calls may be special tokens, so these must be part of the text. finish: in place of
    "stop", where something was called. only_first: further calls are dropped. has_short_ids: nine letters and digits,
    which are all that some chat templates take.
    """

    make_parser: Callable[[], ToolParser]
    shows_special: bool = False
    finish: FinishName = "tool_calls"
    only_first: bool = False
    has_short_ids: bool = False


# name on the command line -> how calls of that form are read
READINGS = MappingProxyType(
    {
        "hermes": ToolReading(HermesParser, shows_special=True),
        "llama3_json": ToolReading(Llama3JsonParser),
        "mistral": ToolReading(MistralParser, shows_special=True, has_short_ids=True),
        "pythonic": ToolReading(PythonicParser),
    }
)


@dataclass(slots=True)
class ReadDelta:
    """News of one choice: content, and pieces of calls, one for each call that has news."""

    content: str = ""
    calls: list[DeltaToolCall] = field(default_factory=list)


class CallReader:
    """Reads one choice, piece by piece. Owner: the encoder of a stream, or the response."""

    def __init__(self, reading: ToolReading) -> None:
        self._reading = reading
        self._parser = reading.make_parser()
        self.num_calls = 0
        self._is_dropping = False

    def read(self, text: str, *, is_last: bool) -> ReadDelta:
        events: list[ToolEvent] = []
        for start in range(0, len(text), _PIECE_CHARS):
            events += self._parser.feed(text[start : start + _PIECE_CHARS])
        if is_last:
            events += self._parser.finish()
        news, contents = ReadDelta(), list[str]()
        for event in _joined(events):
            match event:
                case Content(content):
                    contents.append(content)
                case CallStart(name):
                    self._start(name, news)
                case CallArguments(arguments):
                    self._add(arguments, news)
        news.content = "".join(contents)
        return news

    def finish_of(self, finish: FinishName) -> FinishName:
        """Why the choice ended, as clients know it."""
        return self._reading.finish if finish == "stop" and self.num_calls else finish

    def _start(self, name: str, news: ReadDelta) -> None:
        self._is_dropping = self._reading.only_first and self.num_calls > 0
        if self._is_dropping:
            return
        function = FunctionCall(name=name, arguments="")
        call_id = _new_id(is_short=self._reading.has_short_ids)
        news.calls.append(DeltaToolCall(index=self.num_calls, id=call_id, type="function", function=function))
        self.num_calls += 1

    def _add(self, arguments: str, news: ReadDelta) -> None:
        if self._is_dropping:
            return
        index = self.num_calls - 1
        if news.calls and news.calls[-1].index == index:
            last = news.calls[-1].function
            last.arguments += arguments
        else:
            news.calls.append(DeltaToolCall(index=index, function=FunctionCall(arguments=arguments)))


def _joined(events: Sequence[ToolEvent]) -> Iterator[ToolEvent]:
    """`events` with neighbouring pieces of arguments as one."""
    for kind, run in groupby(events, type):
        found = list(run)
        if kind is CallArguments:
            found = [CallArguments("".join(event.text for event in found if isinstance(event, CallArguments)))]
        yield from found


def read_whole(reading: ToolReading, text: str, finish: FinishName) -> tuple[str | None, list[ToolCall], FinishName]:
    """(content, calls, finish reason) of a complete choice."""
    reader = CallReader(reading)
    news = reader.read(text, is_last=True)
    calls = [ToolCall(id=str(call.id), function=call.function) for call in news.calls]
    return news.content or (None if calls else ""), calls, reader.finish_of(finish)


def _new_id(*, is_short: bool) -> str:
    if is_short:
        return "".join(secrets.choice(_SHORT_ID_CHARS) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
