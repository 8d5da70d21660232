"""The fields of a request that say what the output must be: OpenAI's, vLLM's, and vLLM's older `guided_*`.

All of them mean `StructuredOutputsParams`; a request uses one of them. A JSON Schema is always followed, whatever
`strict` says, and one that cannot be followed is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trivium.errors import InvalidRequestError, rename_params
from trivium.structured_outputs import KINDS, PARAM, StructuredOutputsParams
from trivium_gateway.errors import unsupported_parameter
from trivium_gateway.openai_protocol import GenerationFields

# field -> the kind of StructuredOutputsParams that it stands for
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
}
_SETTINGS = ("disable_any_whitespace", "whitespace_pattern")
_JSON_SCHEMA = "response_format.json_schema"
_JSON_SCHEMA_KEYS = frozenset({"name", "description", "schema", "strict"})
MAX_NAME_CHARS = 64


def given_structured_outputs(request: GenerationFields) -> StructuredOutputsParams | None:
    """What `request` says its output must be. Raises InvalidRequestError in the words of the client."""
    names = _used(request)
    if not names:
        if request.guided_whitespace_pattern is not None:
            raise InvalidRequestError("guided_whitespace_pattern needs guided_json", param="guided_whitespace_pattern")
        return None
    if len(names) > 1:
        raise InvalidRequestError(
            f"{names[0]} and {names[1]} both say what the output must be; give one of them",
            param=names[1],
            code="conflicting_parameters",
        )
    try:
        if names[0] == "response_format":
            return _response_format(request.response_format)
        if names[0] == PARAM:
            return _structured_outputs(request.structured_outputs)
        guided: dict[str, Any] = {_GUIDED[names[0]]: getattr(request, names[0])}
        return StructuredOutputsParams(**guided, whitespace_pattern=request.guided_whitespace_pattern)
    except InvalidRequestError as error:
        raise rename_params(error, client_names(request)) from None


def client_names(request: GenerationFields) -> dict[str, str]:
    """Our names of what the output must be -> those that the client used."""
    names = {f"{PARAM}.{kind}": field for field, kind in _GUIDED.items() if _is_used(getattr(request, field))}
    if request.guided_whitespace_pattern is not None:
        names[f"{PARAM}.whitespace_pattern"] = "guided_whitespace_pattern"
    if request.response_format is not None:
        names |= {f"{PARAM}.json": f"{_JSON_SCHEMA}.schema", f"{PARAM}.json_object": "response_format"}
    return names


def _used(request: GenerationFields) -> list[str]:
    """Fields of `request` that say something, in the order in which OpenAI and vLLM would name them."""
    response_format = request.response_format
    is_text = isinstance(response_format, Mapping) and response_format.get("type") == "text"
    used = [] if response_format is None or is_text else ["response_format"]
    used += [PARAM] if request.structured_outputs is not None else []
    return used + [field for field in _GUIDED if _is_used(getattr(request, field))]


def _is_used(value: object) -> bool:
    return value is not None and value is not False


def _structured_outputs(value: object) -> StructuredOutputsParams:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{PARAM} must be an object", param=PARAM, code="invalid_type")
    for name in value:
        if name not in (*KINDS, *_SETTINGS) and _is_used(value[name]):
            raise unsupported_parameter(f"{PARAM}.{name:.40}")
    known = {name: value[name] for name in (*KINDS, *_SETTINGS) if value.get(name) is not None}
    return StructuredOutputsParams(**known)


def _response_format(value: object) -> StructuredOutputsParams:
    if not isinstance(value, Mapping):
        raise InvalidRequestError("response_format must be an object", param="response_format", code="invalid_type")
    match value.get("type"):
        case "json_object":
            return StructuredOutputsParams(json_object=True)
        case "json_schema":
            return _json_schema(value.get("json_schema"))
        case other:
            raise InvalidRequestError(
                f"response_format.type must be text, json_object or json_schema, got {other!r:.40}",
                param="response_format.type",
            )


def _json_schema(value: object) -> StructuredOutputsParams:
    if not isinstance(value, Mapping):
        raise _wrong("", "must be an object")
    for key in value:
        if key not in _JSON_SCHEMA_KEYS:
            raise unsupported_parameter(f"{_JSON_SCHEMA}.{key:.40}")
    name = value.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARS:
        raise _wrong(".name", f"must be text of 1 to {MAX_NAME_CHARS} characters")
    if not isinstance(value.get("description", ""), str | None):
        raise _wrong(".description", "must be text")
    if not isinstance(value.get("strict"), bool | None):
        raise _wrong(".strict", "must be true or false")
    schema = value.get("schema")
    if not isinstance(schema, Mapping):
        raise _wrong(".schema", "must be an object")
    return StructuredOutputsParams(json=schema)


def _wrong(part: str, reason: str) -> InvalidRequestError:
    text = f"{_JSON_SCHEMA}{part} {reason}"
    return InvalidRequestError(text, param=f"{_JSON_SCHEMA}{part}", code="invalid_schema")
