"""`[TOOL_CALLS]`, and then `[{"name": ..., "arguments": {...}}, ...]` or, since 2025, `name[ARGS]{...}`: Mistral."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum, auto

from trivium_gateway.tool_parsers.events import CallArguments, CallStart, ContentGate, ToolEvent, held_back
from trivium_gateway.tool_parsers.json_array import ArrayReader
from trivium_gateway.tool_parsers.json_call import Status, ValueScanner

TAG = "[TOOL_CALLS]"
_HEAD = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\s*(\[CALL_ID\][A-Za-z0-9]*)?\s*(\[ARGS\])?\s*(?=\{)")
_MAX_HEAD_CHARS = 256


class _State(Enum):
    TEXT = auto()
    HEAD = auto()  # an array, or the name of a function
    ARRAY = auto()
    ARGUMENTS = auto()
    SKIPPING = auto()  # behind a call that is broken


class MistralParser:
    def __init__(self) -> None:
        self._gate = ContentGate()
        self._state = _State.TEXT
        self._buffer = ""
        self._array = ArrayReader()
        self._scanner = ValueScanner()

    def feed(self, text: str) -> Sequence[ToolEvent]:
        self._buffer += text
        events: list[ToolEvent] = []
        while self._buffer and self._step(events):
            pass
        return events

    def finish(self) -> Sequence[ToolEvent]:
        events: list[ToolEvent] = []
        if self._state is _State.TEXT:
            events += self._gate.text(self._buffer)
        elif self._state is _State.HEAD:
            events += self._gate.text(TAG + self._buffer)
        elif self._state is _State.ARRAY and not self._array.has_begun:
            events += self._gate.text(TAG + self._array.raw)
        return [*events, *self._gate.finish()]

    def _step(self, events: list[ToolEvent]) -> bool:
        match self._state:
            case _State.TEXT:
                return self._read_text(events)
            case _State.HEAD:
                return self._read_head(events)
            case _State.ARRAY:
                self._read_array(events)
            case _State.ARGUMENTS:
                self._read_arguments(events)
            case _State.SKIPPING:
                _, mark, after = self._buffer.partition(TAG)
                self._buffer = after if mark else self._buffer[len(self._buffer) - held_back(self._buffer, [TAG]) :]
                self._state = _State.HEAD if mark else self._state
                return bool(mark)
        return True

    def _read_text(self, events: list[ToolEvent]) -> bool:
        before, mark, after = self._buffer.partition(TAG)
        num_held = 0 if mark else held_back(before, [TAG])
        events += self._gate.text(before[: len(before) - num_held])
        self._buffer = after if mark else before[len(before) - num_held :]
        self._state = _State.HEAD if mark else self._state
        return bool(mark)

    def _read_head(self, events: list[ToolEvent]) -> bool:
        stripped = self._buffer.lstrip()
        is_blank = len(self._buffer) - len(stripped) > _MAX_HEAD_CHARS
        if not stripped and not is_blank:
            return False
        if stripped.startswith("[") and not is_blank:
            self._buffer, self._state, self._array = stripped, _State.ARRAY, ArrayReader()
            return True
        match = _HEAD.match(self._buffer[: _MAX_HEAD_CHARS + 1])
        if match is not None:
            self._gate.call()
            events.append(CallStart(match[1]))
            self._buffer, self._state, self._scanner = self._buffer[match.end() :], _State.ARGUMENTS, ValueScanner()
            return True
        if "{" in self._buffer or TAG in self._buffer or len(self._buffer) > _MAX_HEAD_CHARS:
            events += self._gate.text(TAG)
            self._state = _State.TEXT
            return True
        return False

    def _read_array(self, events: list[ToolEvent]) -> None:
        had_begun = self._array.has_begun
        found, self._buffer = self._array.feed(self._buffer)
        for event in found:
            if isinstance(event, CallStart):
                self._gate.call()
            events.append(event)
        if self._array.status is Status.DONE and (had_begun or self._array.has_begun):
            self._state = _State.TEXT
        elif self._array.status is Status.FAILED and self._array.has_begun:
            self._state = _State.SKIPPING
        elif self._array.status is not Status.READING:
            events += self._gate.text(TAG + self._array.raw)
            self._state = _State.TEXT

    def _read_arguments(self, events: list[ToolEvent]) -> None:
        count = 0
        while count < len(self._buffer) and not self._scanner.is_done:
            self._scanner.takes(self._buffer[count])
            count += 1
        events.append(CallArguments(self._buffer[:count]))
        self._buffer = self._buffer[count:]
        if self._scanner.is_done:
            self._state = _State.TEXT
