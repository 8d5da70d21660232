"""From the bytes of a request body to a checked request struct, with one error code per way in which it can be wrong.

Two stages: JSON to plain values (syntax, encoding, depth), plain values to a struct (types of the known fields). The
plain values are kept for a moment in between, because they tell which fields the client really sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from trivium.errors import InvalidRequestError

MAX_DEPTH = 64

_BOM = b"\xef\xbb\xbf"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_ERROR_FIELD = re.compile(r" - at `\$\.(\w+).*`$")
_INVALID_CODES = {"stop": "invalid_stop"}  # field -> code of a value of the wrong type; the others: invalid_type

StructT = TypeVar("StructT", bound=msgspec.Struct)


def decode_fields(body: bytes) -> dict[str, Any]:
    """The top-level object in `body`. Of duplicate keys the last one counts. Raises InvalidRequestError."""
    body = body.removeprefix(_BOM)
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _syntax_error(body) from None
    if not isinstance(value, dict):
        raise InvalidRequestError("the request body must be a JSON object", code="invalid_type")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return value


def to_struct(fields: Mapping[str, Any], cls: type[StructT]) -> StructT:
    """`fields` as a request of type `cls`; unknown fields are left out.

    Raises InvalidRequestError that names the first field of a wrong type.
    """
    try:
        return msgspec.convert(fields, cls)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _ERROR_FIELD.search(text)
        param = found[1] if found else None
        reason = text[: found.start()] if found else text
        code = _INVALID_CODES.get(param or "", "invalid_type")
        raise InvalidRequestError(f"{param or 'request'}: {reason}", param=param, code=code) from None


def _check_depth(value: object) -> None:
    """Raise if containers nest deeper than MAX_DEPTH. Goes down level by level, so it needs no recursion."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for container in level
            for child in (container.values() if type(container) is dict else container)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"the request body nests deeper than {MAX_DEPTH} levels", code="json_too_deep")


def _syntax_error(body: bytes) -> InvalidRequestError:
    """Why `body` is no JSON. Only asked for bodies that were refused already."""
    try:
        body.decode()
    except UnicodeDecodeError:
        return InvalidRequestError("the request body must be UTF-8", code="invalid_encoding")
    if b"\0" in body[:4]:  # UTF-16 and UTF-32, which are valid UTF-8 as long as they hold ASCII only
        return InvalidRequestError("the request body must be UTF-8", code="invalid_encoding")
    if _SURROGATE_ESCAPE.search(body):
        return _surrogate_error(body)
    return _invalid_json()


def _surrogate_error(body: bytes) -> InvalidRequestError:
    """Names the field with half a surrogate pair, if that is what is wrong with `body`.

    The standard library's decoder lets halves pass, which is wrong for a request and right for finding the field.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return _invalid_json()
    if not _holds_lone_surrogate(value):
        return _invalid_json()
    items = value.items() if isinstance(value, dict) else ()
    param = next((name for name, item in items if name.isidentifier() and _holds_lone_surrogate(item)), None)
    text = f"{param or 'the request body'} holds a lone surrogate, which is not a character"
    return InvalidRequestError(text, param=param, code="invalid_unicode")


def _holds_lone_surrogate(value: object) -> bool:
    return _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)) is not None


def _invalid_json() -> InvalidRequestError:
    return InvalidRequestError("the request body is not valid JSON", code="invalid_json")
