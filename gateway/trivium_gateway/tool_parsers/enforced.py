"""Calls that a grammar holds the model to: the whole text is one, or all of them."""

from __future__ import annotations

from collections.abc import Sequence

from trivium_gateway.tool_parsers.events import CallArguments, CallStart, ToolEvent
from trivium_gateway.tool_parsers.json_array import ArrayReader


class NamedCallParser:
    """The text is the arguments of the function `name`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def feed(self, text: str) -> Sequence[ToolEvent]:
        if not text:
            return []
        start: list[ToolEvent] = [] if self._has_begun else [CallStart(self._name)]
        self._has_begun = True
        return [*start, CallArguments(text)]

    def finish(self) -> Sequence[ToolEvent]:
        return []


class RequiredCallsParser:
    """The text is an array of calls."""

    def __init__(self) -> None:
        self._array = ArrayReader()

    def feed(self, text: str) -> Sequence[ToolEvent]:
        return self._array.feed(text)[0]

    def finish(self) -> Sequence[ToolEvent]:
        return []
