"""`{"name": ..., "parameters": {...}}` and nothing else, several of them behind semicolons: Llama 3.1 and later.

It may begin with `<|python_tag|>`. An answer that is some other JSON object is content.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from trivium_gateway.tool_parsers.events import ContentGate, ToolEvent
from trivium_gateway.tool_parsers.json_call import CallScanner, Status

TAG = "<|python_tag|>"


class _State(Enum):
    START = auto()  # of the answer, or behind a semicolon
    CALL = auto()
    BETWEEN = auto()
    TEXT = auto()


class Llama3JsonParser:
    def __init__(self) -> None:
        self._gate = ContentGate()
        self._state = _State.START
        self._buffer = ""
        self._before: list[str] = []  # what was read since the last call, and is content if no call follows
        self._has_tag = False  # in these
        self._scanner = CallScanner(needs_arguments=True)

    def feed(self, text: str) -> Sequence[ToolEvent]:
        self._buffer += text
        events: list[ToolEvent] = []
        while self._buffer and self._step(events):
            pass
        return events

    def finish(self) -> Sequence[ToolEvent]:
        events: list[ToolEvent] = []
        if not self._scanner.has_begun:
            events += self._gate.text("".join(self._before) + self._scanner.take_raw())
        return [*events, *self._gate.text(self._buffer), *self._gate.finish()]

    def _step(self, events: list[ToolEvent]) -> bool:
        match self._state:
            case _State.START:
                return self._read_start()
            case _State.CALL:
                self._read_call(events)
            case _State.BETWEEN:
                self._read_between()
            case _State.TEXT:
                events += self._gate.text("".join(self._before) + self._buffer)
                self._before, self._buffer = [], ""
        return True

    def _read_start(self) -> bool:
        """Look for an object, as far as there is enough to tell."""
        stripped = self._buffer.lstrip()
        self._before.append(self._buffer[: len(self._buffer) - len(stripped)])
        self._buffer = stripped
        if stripped.startswith(TAG) and not self._has_tag:
            self._before.append(TAG)
            self._buffer, self._has_tag = stripped[len(TAG) :], True
            return True
        if TAG.startswith(stripped):
            return False
        if stripped.startswith("{"):
            self._state = _State.CALL
            self._scanner = CallScanner(needs_arguments=True)
        else:
            self._state = _State.TEXT
        return True

    def _read_call(self, events: list[ToolEvent]) -> None:
        scanner = self._scanner
        had_begun, count = scanner.has_begun, scanner.feed(self._buffer)
        self._buffer = self._buffer[count:]
        if scanner.has_begun and not had_begun:
            self._gate.call()
            self._before = []
        events += scanner.take()
        if scanner.status is Status.DONE:
            self._state = _State.BETWEEN
        elif scanner.status is Status.FAILED:
            self._before.append(scanner.take_raw())
            self._state = _State.TEXT

    def _read_between(self) -> None:
        self._buffer = self._buffer.lstrip()
        if self._buffer.startswith(";"):
            self._before, self._has_tag, self._state = [";"], False, _State.START
            self._buffer = self._buffer[1:]
        elif self._buffer:
            self._state = _State.TEXT
