"""Random JSON schemas whose instances have a bounded length: what a model writes under one of them must come to an end.

A schema is a function of its seed, and holds only what grammars support. A number without `multipleOf` may have any
number of digits, so there is none.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 3
_WORDS = ("id", "name", "größe", "a b", 'quo"te', "back\\slash", "x/y", "日本", "", "$ref", "type", "😀")
_TEXTS = ("", "a", "two words", 'quo"te', "tab\t", "back\\slash", "é", "日本", "😀", "null", "0")
_PATTERNS = (  # with LOW and HIGH for numbers
    "^[a-z]{LOW,HIGH}$",
    "^[A-Z][0-9]{LOW}(-[0-9]{HIGH})?$",
    "^(foo|bar|ba{1,HIGH}z{LOW})$",
    r"^[^a-y\s]{LOW,HIGH}$",
    r"^\d{LOW}\.\d{HIGH}$",
    "^(é|ü|😀){LOW,HIGH}$",
)
_FORMATS = ("date", "ipv4", "ipv6", "uuid", "email")  # those that jsonschema checks by itself

Schema = dict[str, Any]


def make_schema(seed: int) -> Schema:
    """A schema, an object more often than not."""
    maker = _Maker(random.Random(seed))
    schema = maker.object(0) if seed % 3 else maker.nested(0)
    return {**schema, "$defs": maker.defs} if maker.defs else schema


def keywords(schema: Any) -> set[str]:
    """The keywords of `schema` at any depth; names of properties among them."""
    if isinstance(schema, dict):
        return set(schema).union(*(keywords(value) for value in schema.values()))
    return set().union(*(keywords(item) for item in schema)) if isinstance(schema, list) else set()


class _Maker:
    """Makes one schema; `defs` is what its references name."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.defs: dict[str, Schema] = {}
        self._leaves: tuple[Callable[[], Schema], ...] = (
            self._integer,
            self._number,
            self._text,
            self._text,
            self._pattern,
            self._format,
            self._const,
            self._enum,
            self._nullable,
            lambda: {"type": "boolean"},
            lambda: {"type": "null"},
        )
        self._nested: tuple[Callable[[int], Schema], ...] = (
            self.object,
            self.object,
            self._array,
            self._tuple,
            self._any_of,
            self._all_of,
            self._reference,
        )

    def any(self, depth: int) -> Schema:
        if depth < MAX_DEPTH and self._rng.random() < 0.5:
            return self.nested(depth)
        return self._rng.choice(self._leaves)()

    def nested(self, depth: int) -> Schema:
        return self._rng.choice(self._nested)(depth)

    def object(self, depth: int) -> Schema:
        names = self._rng.sample(_WORDS, self._rng.randint(0, 6))
        properties = {name: self.any(depth + 1) for name in names}
        required = [name for name in names if self._rng.random() < 0.6]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def _array(self, depth: int) -> Schema:
        low = self._rng.randint(0, 2)
        bounds = {"minItems": low, "maxItems": low + self._rng.randint(0, 3)}
        return {"type": "array", "items": self.any(depth + 1), **bounds}

    def _tuple(self, depth: int) -> Schema:
        items = [self.any(depth + 1) for _ in range(self._rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": self._rng.randint(0, len(items))}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth + 1) for _ in range(self._rng.randint(1, 3))]}

    def _all_of(self, depth: int) -> Schema:
        low = self._rng.randint(-50, 50)
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + self._rng.randint(0, 100)}]}

    def _reference(self, depth: int) -> Schema:
        name = f"part {len(self.defs)}"
        self.defs[name] = {}
        self.defs[name] = self.any(depth + 1)
        return {"$ref": f"#/$defs/{name.replace(' ', '%20')}"}

    def _integer(self) -> Schema:
        low = self._rng.randint(-1000, 1000)
        keys = self._rng.choice((("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")))
        bounds = dict(zip(keys, (low, low + self._rng.randint(2, 2000)), strict=True))
        if self._rng.random() < 0.2:
            return {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": self._rng.randint(1, 9)}
        return {"type": "integer", **bounds}

    def _number(self) -> Schema:
        low = self._rng.choice((-12.5, -1, 0, 0.25, 3))
        high = low + self._rng.choice((0.5, 1, 100))
        return {"type": "number", "minimum": low, "maximum": high, "multipleOf": self._rng.choice((0.25, 0.5))}

    def _text(self) -> Schema:
        low = self._rng.randint(0, 4)
        return {"type": "string", "minLength": low, "maxLength": low + self._rng.randint(0, 8)}

    def _pattern(self) -> Schema:
        low = self._rng.randint(1, 3)
        pattern = self._rng.choice(_PATTERNS).replace("LOW", str(low))
        return {"type": "string", "pattern": pattern.replace("HIGH", str(low + self._rng.randint(1, 4)))}

    def _format(self) -> Schema:
        name = self._rng.choice(_FORMATS)
        return {"type": "string", "format": name} | ({"maxLength": 24} if name == "email" else {})

    def _const(self) -> Schema:
        return {"const": self._value(2)}

    def _enum(self) -> Schema:
        return {"enum": [self._value(1) for _ in range(self._rng.randint(1, 5))]}

    def _nullable(self) -> Schema:
        return {"type": ["string", "null", "boolean"], "maxLength": self._rng.randint(0, 6)}

    def _value(self, depth: int) -> Any:
        kind = self._rng.randint(0, 5 if depth else 3)
        match kind:
            case 0:
                return self._rng.choice((None, True, False))
            case 1:
                return self._rng.choice((0, -7, 10**20, 2.5, 1e-7))
            case 2 | 3:
                return self._rng.choice(_TEXTS)
            case 4:
                return [self._value(depth - 1) for _ in range(self._rng.randint(0, 2))]
        return {name: self._value(depth - 1) for name in self._rng.sample(_WORDS, self._rng.randint(0, 2))}
