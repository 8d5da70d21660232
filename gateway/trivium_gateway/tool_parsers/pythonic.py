"""`[name(argument=value, ...), ...]`, a list of calls as Python writes them, and nothing else: Llama 3.2 and 4.

A call is told when it is complete: its arguments are Python, and become JSON. Nothing is evaluated.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from trivium_gateway.tool_parsers.events import CallArguments, CallStart, ContentGate, ToolEvent

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,63}")
_BEGIN = re.compile(rf"{_NAME.pattern}\(")
_JSON_WORDS = {"true": True, "false": False, "null": None}
_MAX_CALL_CHARS = 20_000


class _State(Enum):
    START = auto()
    CALL = auto()
    BETWEEN = auto()
    TEXT = auto()
    SKIPPING = auto()  # behind a call that cannot be read


class PythonicParser:
    def __init__(self) -> None:
        self._gate = ContentGate()
        self._state = _State.START
        self._buffer = ""
        self._raw: list[str] = []  # what was read before the first call, the bracket and what follows it
        self._num_scanned = 0  # characters of the call that were looked at
        self._depth = 0
        self._quote = ""  # that the string which is being read began with
        self._is_escaped = False
        self._num_calls = 0

    def feed(self, text: str) -> Sequence[ToolEvent]:
        self._buffer += text
        events: list[ToolEvent] = []
        while self._buffer and self._step(events):
            pass
        return events

    def finish(self) -> Sequence[ToolEvent]:
        """A call that was not complete is content if it is the first, and else dropped, as it has no whole argument."""
        events: list[ToolEvent] = []
        if not self._num_calls:
            events += self._gate.text("".join(self._raw) + self._buffer)
        return [*events, *self._gate.finish()]

    def _step(self, events: list[ToolEvent]) -> bool:
        match self._state:
            case _State.START:
                return self._read_start(events)
            case _State.CALL:
                return self._read_call(events)
            case _State.BETWEEN:
                self._read_between()
            case _State.TEXT:
                events += self._gate.text("".join(self._raw) + self._buffer)
                self._raw, self._buffer = [], ""
            case _State.SKIPPING:
                self._buffer = ""
        return True

    def _read_start(self, events: list[ToolEvent]) -> bool:
        stripped = self._buffer.lstrip()
        space, self._buffer = self._buffer[: len(self._buffer) - len(stripped)], stripped
        if not self._raw:
            events += self._gate.text(space)
            if stripped.startswith("["):
                self._raw, self._buffer = ["["], stripped[1:]
                return True
        else:
            self._raw.append(space)
            if _BEGIN.match(stripped):
                self._state = _State.CALL
                return True
            if _NAME.fullmatch(stripped):
                return False
        if stripped:
            self._state = _State.TEXT
        return bool(stripped)

    def _read_call(self, events: list[ToolEvent]) -> bool:
        end = self._find_end()
        if end is None and len(self._buffer) <= _MAX_CALL_CHARS:
            return False
        call = None if end is None or end > _MAX_CALL_CHARS else _read_python(self._buffer[:end])
        if call is None:
            self._state = _State.SKIPPING if self._num_calls else _State.TEXT
            return True
        self._gate.call()
        events += [CallStart(call[0]), CallArguments(call[1])]
        self._num_calls += 1
        self._buffer, self._state, self._num_scanned = self._buffer[end:], _State.BETWEEN, 0
        return True

    def _find_end(self) -> int | None:
        """Behind the parenthesis that closes the call, if it is there."""
        for index in range(self._num_scanned, len(self._buffer)):
            char = self._buffer[index]
            if self._quote:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == self._quote:
                    self._quote = ""
            elif char in "'\"":
                self._quote = char
            elif char in "([{":
                self._depth += 1
            elif char in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    self._depth = 0
                    return index + 1
        self._num_scanned = len(self._buffer)
        return None

    def _read_between(self) -> None:
        self._buffer = self._buffer.lstrip()
        char = self._buffer[:1]
        if char == ",":
            self._buffer = self._buffer[1:].lstrip()
            self._state = _State.CALL
        elif char == "]":
            self._buffer, self._raw, self._state = self._buffer[1:], [], _State.TEXT
        elif char:
            self._state = _State.SKIPPING


def _read_python(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON) of one call; None if it is something else."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
            node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
            return None
        name = ast.unparse(node.func)
        arguments = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
        shown = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        shown.encode()
        return (name, shown) if _NAME.fullmatch(name) else None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    """What a literal stands for. Raises ValueError for anything else."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in _JSON_WORDS:
            return _JSON_WORDS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            return {str(_value(key)): _value(value) for key, value in zip(keys, values, strict=True) if key is not None}
    raise ValueError("no literal")
