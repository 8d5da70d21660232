"""Calls as a JSON array of objects, [{"name": ..., "arguments": {...}}, ...], read while it is being written."""

from __future__ import annotations

from trivium_gateway.tool_parsers.events import ToolEvent
from trivium_gateway.tool_parsers.json_call import CallScanner, Status

_SPACE = " \t\r\n"


class ArrayReader:
    """Reads one array. A broken call ends the reading: what is behind it cannot be told apart any more."""

    def __init__(self) -> None:
        self.status = Status.READING
        self.has_begun = False
        self._raw: list[str] = []  # all that was read, until the first call has begun
        self._scanner: CallScanner | None = None
        self._expects = "["  # one of these characters, or an object where "{" is among them

    @property
    def raw(self) -> str:
        """All that was read, if no call has begun."""
        return "".join(self._raw)

    def feed(self, text: str) -> tuple[list[ToolEvent], str]:
        """(events, what is behind the end or failure)"""
        events: list[ToolEvent] = []
        while text and self.status is Status.READING:
            text = self._read_object(text, events) if self._scanner is not None else self._read_between(text)
        return events, text

    def _read_object(self, text: str, events: list[ToolEvent]) -> str:
        scanner = self._scanner
        assert scanner is not None, "no object is being read"
        count = scanner.feed(text)
        events += scanner.take()
        if scanner.has_begun:
            self.has_begun, self._raw = True, []
        elif not self.has_begun:
            self._raw.append(text[:count])
        if scanner.status is Status.DONE:
            self._scanner, self._expects = None, ",]"
        elif scanner.status is Status.FAILED:
            self.status = Status.FAILED
        return text[count:]

    def _read_between(self, text: str) -> str:
        stripped = text.lstrip(_SPACE)
        if stripped != text:
            self._keep(text[: len(text) - len(stripped)])
            return stripped
        char = text[0]
        if char not in self._expects:
            self.status = Status.FAILED
            return text
        if char == "{":
            self._scanner = CallScanner()
            return text
        self._keep(char)
        if char == "]":
            self.status = Status.DONE
        elif char in "[,":
            self._expects = "{]" if char == "[" else "{"
        return text[1:]

    def _keep(self, text: str) -> None:
        if not self.has_begun:
            self._raw.append(text)
