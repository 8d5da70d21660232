"""`StructuredOutputsParams`: what the output must be, in vLLM's names. Knows no grammar engine.

A wrong value raises InvalidRequestError with a param such as `structured_outputs.regex`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trivium.errors import InvalidRequestError

PARAM = "structured_outputs"
KINDS = ("json", "regex", "choice", "grammar", "json_object")
MAX_GRAMMAR_CHARS = 2**17  # of a schema, a regex or a grammar
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 1024
MAX_SCHEMA_DEPTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of: a JSON Schema (text or object), a regular expression that the whole output matches, a list of
    strings, a grammar (Lark or GBNF), any JSON object.

    disable_any_whitespace: JSON without spaces and line ends between its parts. whitespace_pattern: a regular
    expression for what may be there, by default one space or one line break with its indentation. Both are for `json`
    and `json_object`.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        if self.json_object is False:
            set_field(self, "json_object", None)
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                f"{PARAM} must have exactly one of {', '.join(KINDS)}, got {' and '.join(given) or 'none'}",
                param=PARAM,
                code="conflicting_parameters" if given else "invalid_value",
            )
        if self.json is not None:
            set_field(self, "json", _as_schema(self.json))
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None:
                _check_text(name, value)
        if self.choice is not None:
            set_field(self, "choice", _as_choices(self.choice))
        if not isinstance(self.json_object, bool | None):
            raise _invalid("json_object", "must be true or false")
        self._check_whitespace()

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def param(self) -> str:
        """The name of what was given, for errors."""
        return f"{PARAM}.{self.kind}"

    def _check_whitespace(self) -> None:
        if not isinstance(self.disable_any_whitespace, bool):
            raise _invalid("disable_any_whitespace", "must be true or false")
        name = "disable_any_whitespace" if self.disable_any_whitespace else "whitespace_pattern"
        if self.disable_any_whitespace or self.whitespace_pattern is not None:
            if self.kind not in ("json", "json_object"):
                raise _invalid(name, "is for json and json_object only")
            if self.disable_any_whitespace and self.whitespace_pattern is not None:
                raise _invalid("whitespace_pattern", "contradicts disable_any_whitespace")


def _as_schema(schema: object) -> str:
    """`schema` as JSON in one form, its properties in the order in which they were written."""
    try:
        if isinstance(schema, str):
            _check_text("json", schema)
            schema = json.loads(schema)
        if not isinstance(schema, (Mapping, bool)):
            raise _invalid("json", f"must be a JSON Schema, got {type(schema).__name__}")
        _check_depth(schema)
        text = json.dumps({} if schema is True else schema, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except InvalidRequestError:
        raise
    except (TypeError, ValueError, RecursionError):
        raise _invalid("json", "is not valid JSON") from None
    _check_text("json", text)
    return text


def _check_depth(schema: Mapping[str, Any] | bool) -> None:
    level: list[Any] = [schema] if isinstance(schema, Mapping) else []
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, Mapping) else container)
            if isinstance(child, (Mapping, list, tuple))
        ]
    if level:
        raise _invalid("json", f"nests deeper than {MAX_SCHEMA_DEPTH} levels", code="too_long")


def _as_choices(choices: object) -> tuple[str, ...]:
    if not isinstance(choices, Sequence) or isinstance(choices, (str, bytes)) or not 1 <= len(choices) <= MAX_CHOICES:
        raise _invalid("choice", f"must be a list of 1 to {MAX_CHOICES} strings")
    for choice in choices:
        if not isinstance(choice, str) or not 1 <= len(choice) <= MAX_CHOICE_CHARS:
            raise _invalid("choice", f"must hold strings of 1 to {MAX_CHOICE_CHARS} characters, got {choice!r:.40}")
        _check_unicode("choice", choice)
    return tuple(dict.fromkeys(choices))


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise _invalid(name, f"must be text that is not empty, got {value!r:.40}")
    if len(value) > MAX_GRAMMAR_CHARS:
        raise _invalid(name, f"has {len(value)} characters, at most {MAX_GRAMMAR_CHARS} are taken", code="too_long")
    _check_unicode(name, value)


def _check_unicode(name: str, value: str) -> None:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _invalid(name, "holds a lone surrogate, which is not a character", code="invalid_unicode") from None


def _invalid(name: str, reason: str, *, code: str | None = None) -> InvalidRequestError:
    if name in KINDS:
        code = code or "invalid_grammar"
    return InvalidRequestError(f"{PARAM}.{name} {reason}", param=f"{PARAM}.{name}", code=code)
