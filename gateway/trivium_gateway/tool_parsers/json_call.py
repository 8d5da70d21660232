"""One call as a JSON object, {"name": ..., "arguments": {...}}, read while it is being written.

Keys may come in any order, `parameters` means `arguments`, other keys are passed over. The arguments are told as the
model writes them, from the moment at which the name is known. Read character by character: a JSON parser needs the
whole text.
"""

from __future__ import annotations

import json
from enum import Enum, auto

from trivium_gateway.tool_parsers.events import CallArguments, CallStart, ToolEvent

_SPACE = " \t\r\n"
_ARGUMENT_KEYS = ("arguments", "parameters")


class Status(Enum):
    READING = auto()
    DONE = auto()
    FAILED = auto()


class ValueScanner:
    """Finds the end of one JSON value. What is inside is not checked, but for brackets and strings."""

    def __init__(self) -> None:
        self.is_done = False
        self._has_begun = False
        self._is_scalar = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def takes(self, char: str) -> bool:
        """Whether `char` is part of the value. Behind a number or a word comes one character that is not."""
        if not self._has_begun:
            return self._begin(char)
        if self._is_scalar:
            self.is_done = char in ",}]" or char in _SPACE
            return not self.is_done
        if self._in_string:
            self._read_in_string(char)
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        self.is_done = not self._in_string and self._depth == 0
        return True

    def _begin(self, char: str) -> bool:
        if char in ",:}]":
            self.is_done = True
            return False
        self._has_begun = True
        self._in_string = char == '"'
        self._depth = int(char in "{[")
        self._is_scalar = not self._in_string and not self._depth
        return True

    def _read_in_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False


class _Place(Enum):
    BEFORE = auto()  # the object
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA = auto()


class CallScanner:
    """Reads one object. needs_arguments: an object without them is no call.

    `events` are those that nobody has taken yet. Texts that grow are lists, or their growth would be quadratic.
    """

    def __init__(self, *, needs_arguments: bool = False) -> None:
        self.status = Status.READING
        self.events: list[ToolEvent] = []
        self.has_begun = False
        self._raw: list[str] = []  # all that was read, until the call has begun
        self._needs_arguments = needs_arguments
        self._place = _Place.BEFORE
        self._scanner: ValueScanner | None = None  # of the key or value that is being read
        self._text: list[str] = []  # what was read of it
        self._key = ""
        self._name: str | None = None
        self._arguments: list[str] | None = None  # what nobody has been told of them yet
        self._has_arguments = False  # all of them

    def feed(self, text: str) -> int:
        """Read on; the number of characters that were part of the object, all unless it ended or failed within."""
        for index, char in enumerate(text):
            if not self._read(char):
                self._tell()
                return index
            if not self.has_begun:
                self._raw.append(char)
            if self.status is not Status.READING:
                self._tell()
                return index + 1
        self._tell()
        return len(text)

    def take_raw(self) -> str:
        """All that was read and not taken by this, unless it has become a call."""
        raw, self._raw = "".join(self._raw), []
        return raw

    def take(self) -> list[ToolEvent]:
        """The events since the last call of this."""
        events, self.events = self.events, []
        return events

    def _read(self, char: str) -> bool:
        """Whether `char` was part of the object; if not, it has failed."""
        if self._scanner is not None:
            return self._read_value(char)
        if char in _SPACE:
            return True
        match self._place:
            case _Place.BEFORE if char == "{":
                self._place = _Place.KEY
            case _Place.KEY if char == '"':
                self._scanner, self._text = ValueScanner(), []
                return self._read_value(char)
            case _Place.COLON if char == ":":
                self._place = _Place.VALUE
            case _Place.VALUE:
                self._scanner, self._text = ValueScanner(), []
                return self._read_value(char)
            case _Place.COMMA if char == ",":
                self._place = _Place.KEY
            case _Place.KEY | _Place.COMMA if char == "}":
                self._end()
            case _:
                return self._fail()
        return True

    def _read_value(self, char: str) -> bool:
        assert self._scanner is not None, "no value is being read"
        takes = self._scanner.takes(char)
        if takes:
            self._text.append(char)
            if self._is_in_arguments and self._text[0] != '"':  # a text is decoded when it is complete
                self._arguments = self._arguments or []
                self._arguments.append(char)
        if self._scanner.is_done:
            self._scanner = None
            if not self._text or not self._take_value():
                return self._fail()
            return takes or self._read(char)
        return True

    @property
    def _is_in_arguments(self) -> bool:
        return self._place is _Place.VALUE and self._key in _ARGUMENT_KEYS and not self._has_arguments

    def _take_value(self) -> bool:
        """Use a whole key or value; False if it is not what it has to be."""
        if self._place is _Place.KEY:
            self._key, self._place = _decoded("".join(self._text)) or "", _Place.COLON
            return True
        is_good = True
        if self._key == "name" and self._name is None:
            self._name = _decoded("".join(self._text))
            is_good = bool(self._name)
        elif self._is_in_arguments:
            self._has_arguments = True
            if self._text[0] == '"':
                arguments = _decoded("".join(self._text))
                self._arguments = None if arguments is None else [arguments]
                is_good = arguments is not None
        self._place = _Place.COMMA
        return is_good

    def _tell(self) -> None:
        """Make events of what is known."""
        if self._name is None or self._arguments is None or self.status is Status.FAILED:
            return
        if not self.has_begun:
            self.has_begun, self._raw = True, []
            self.events.append(CallStart(self._name))
        told, self._arguments = "".join(self._arguments), []
        if told:
            self.events.append(CallArguments(told))

    def _end(self) -> None:
        if self._arguments is None and not self._needs_arguments:
            self._arguments = ["{}"]
        is_call = self._name is not None and self._arguments is not None
        self.status = Status.DONE if is_call else Status.FAILED

    def _fail(self) -> bool:
        self._tell()
        self.status = Status.FAILED
        return False


def _decoded(text: str) -> str | None:
    """The text that a JSON string stands for; None if it is no string, or has half a character in it."""
    try:
        value = json.loads(text)
        if isinstance(value, str):
            value.encode()
            return value
    except ValueError:
        pass
    return None
