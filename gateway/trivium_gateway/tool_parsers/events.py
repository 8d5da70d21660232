"""What a parser tells of a text: pieces of content, and calls that begin and grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A new call; the arguments that follow are its own."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of the newest call: JSON, as far as the model wrote any."""

    text: str


ToolEvent: TypeAlias = Content | CallStart | CallArguments


class ToolParser(Protocol):
    """Reads one choice. State belongs to it alone; nothing may be fed after `finish`."""

    def feed(self, text: str) -> Sequence[ToolEvent]:
        """What is certain now that `text` has come."""
        ...

    def finish(self) -> Sequence[ToolEvent]:
        """What is left when nothing more comes."""
        ...


class ContentGate:
    """Content without the white space around calls, which is only layout. Owner: a parser.

    White space at the beginning, and behind a call, is held back until something else follows it.
    """

    def __init__(self) -> None:
        self._held: list[str] = []
        self._is_open = False
        self._num_calls = 0

    def text(self, text: str) -> list[ToolEvent]:
        if not self._is_open:
            self._held.append(text)
            if not text.strip():
                return []
            text, self._held, self._is_open = "".join(self._held), [], True
            text = text.lstrip() if self._num_calls else text
        return [Content(text)] if text else []

    def call(self) -> None:
        """A call begins here."""
        self._held, self._is_open = [], False
        self._num_calls += 1

    def finish(self) -> list[ToolEvent]:
        held, self._held = "".join(self._held), []
        return [Content(held)] if held and not self._num_calls else []


def held_back(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    longest = max(map(len, marks)) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-count:]) for mark in marks):
            return count
    return 0
