"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them: Hermes, Qwen."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from trivium_gateway.tool_parsers.events import ContentGate, ToolEvent, held_back
from trivium_gateway.tool_parsers.json_call import CallScanner, Status

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class _State(Enum):
    TEXT = auto()
    CALL = auto()
    CLOSING = auto()  # the object is complete
    SKIPPING = auto()  # the rest of a call that is broken


class HermesParser:
    """The end of a call is that of its object; what else stands before `</tool_call>` is dropped."""

    def __init__(self) -> None:
        self._gate = ContentGate()
        self._state = _State.TEXT
        self._buffer = ""
        self._scanner = CallScanner()

    def feed(self, text: str) -> Sequence[ToolEvent]:
        self._buffer += text
        events: list[ToolEvent] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> Sequence[ToolEvent]:
        events: list[ToolEvent] = []
        if self._state is _State.TEXT:
            events += self._gate.text(self._buffer)
        elif self._state is _State.CALL and not self._scanner.has_begun:
            events += self._gate.text(OPEN + self._scanner.take_raw())
        return [*events, *self._gate.finish()]

    def _step(self, events: list[ToolEvent]) -> bool:
        """Read on as far as the state goes; whether there is more to read."""
        match self._state:
            case _State.TEXT:
                return self._read_text(events)
            case _State.CALL:
                return self._read_call(events)
            case _State.CLOSING:
                return self._read_closing()
            case _State.SKIPPING:
                return self._skip()

    def _read_text(self, events: list[ToolEvent]) -> bool:
        before, mark, after = self._buffer.partition(OPEN)
        if mark:
            events += self._gate.text(before)
            self._buffer, self._state, self._scanner = after, _State.CALL, CallScanner()
            return True
        num_held = held_back(self._buffer, [OPEN])
        events += self._gate.text(self._buffer[: len(self._buffer) - num_held])
        self._buffer = self._buffer[len(self._buffer) - num_held :]
        return False

    def _read_call(self, events: list[ToolEvent]) -> bool:
        scanner = self._scanner
        had_begun, count = scanner.has_begun, scanner.feed(self._buffer)
        self._buffer = self._buffer[count:]
        if scanner.has_begun and not had_begun:
            self._gate.call()
        events += scanner.take()
        if scanner.status is Status.READING:
            return False
        if scanner.status is Status.DONE:
            self._state = _State.CLOSING
        elif scanner.has_begun:
            self._state = _State.SKIPPING
        else:
            events += self._gate.text(OPEN + scanner.take_raw())
            self._state = _State.TEXT
        return True

    def _read_closing(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if self._buffer.startswith(CLOSE):
            self._buffer, self._state = self._buffer[len(CLOSE) :], _State.TEXT
            return True
        if CLOSE.startswith(self._buffer):
            return False
        self._state = _State.SKIPPING
        return True

    def _skip(self) -> bool:
        places = [place for mark in (OPEN, CLOSE) if (place := self._buffer.find(mark)) >= 0]
        if not places:
            self._buffer = self._buffer[len(self._buffer) - held_back(self._buffer, [OPEN, CLOSE]) :]
            return False
        self._buffer = self._buffer[min(places) :].removeprefix(CLOSE)
        self._state = _State.TEXT
        return True
