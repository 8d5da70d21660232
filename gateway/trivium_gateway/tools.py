"""Tools of a chat: checked, shown to the model by its chat template, and what becomes of its calls.

| `tool_choice` | what the model may write | how it is read |
|---|---|---|
| "auto", or none | anything | by the parser of the model; without one calls stay in the text |
| "required" | a JSON array of calls, by a grammar | as that |
| one function by name | its arguments, by a grammar of its parameters | as that |
| "none" | anything, and the template shows no tools | as text |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trivium.config import ModelInfo
from trivium.errors import InvalidRequestError
from trivium.structured_outputs import StructuredOutputsParams
from trivium_gateway.openai_protocol import ChatCompletionRequest
from trivium_gateway.tool_calls import READINGS, ToolReading
from trivium_gateway.tool_parsers.enforced import NamedCallParser, RequiredCallsParser

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ANY_ARGUMENTS = {"type": "object"}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """shown: the tools for the template. reading: None if the text is just text. grammar: what it is held to."""

    shown: list[dict[str, Any]] | None = None
    reading: ToolReading | None = None
    grammar: StructuredOutputsParams | None = None


def tool_use(request: ChatCompletionRequest, parser: str | None) -> ToolUse:
    """What `request` wants of its tools; parser: of the model. Raises InvalidRequestError."""
    tools, choice = _check_tools(request.tools), request.tool_choice
    is_single = request.parallel_tool_calls is False
    if choice not in (None, "none", "auto", "required") and not isinstance(choice, dict):
        raise _invalid(
            f"tool_choice must be 'none', 'auto', 'required' or a function by name, got {choice!r:.40}", "tool_choice"
        )
    if not tools:
        if choice == "required" or isinstance(choice, dict):
            raise _invalid("tool_choice needs tools", "tool_choice")
        return ToolUse()
    if choice == "none":
        return ToolUse()
    if choice == "required":
        try:
            schema = _calls_schema(tools, is_single=is_single)
        except RecursionError:
            raise _invalid("tools are nested too deeply", "tools") from None
        grammar = StructuredOutputsParams(json=schema)
        return ToolUse(tools, ToolReading(RequiredCallsParser), grammar)
    if isinstance(choice, dict):
        function = _find(choice, tools)
        grammar = StructuredOutputsParams(json=function.get("parameters") or _ANY_ARGUMENTS)
        return ToolUse(tools, ToolReading(partial(NamedCallParser, function["name"]), finish="stop"), grammar)
    if parser is None:
        if is_single:
            raise InvalidRequestError(
                "parallel_tool_calls=false needs a parser of calls, or tool_choice 'required'",
                param="parallel_tool_calls",
                code="unsupported_parameter",
            )
        return ToolUse(tools)
    return ToolUse(tools, replace(READINGS[parser], only_first=is_single))


def shown_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as the template shows them. Raises InvalidRequestError."""
    return _check_tools(tools) or None


def refuse_template_fields(request: ChatCompletionRequest, info: ModelInfo) -> None:
    """Raise InvalidRequestError for what only a chat template could read."""
    for name in ("tools", "chat_template_kwargs"):
        if getattr(request, name):
            raise InvalidRequestError(
                f"{name} needs a chat template, {info.name} is an encoder-decoder model", param=name
            )


def _find(choice: dict[str, Any], tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The function that `choice` names."""
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise _invalid("tool_choice must be {'type': 'function', 'function': {'name': ...}}", "tool_choice")
    for tool in tools:
        if tool["function"]["name"] == name:
            found: dict[str, Any] = tool["function"]
            return found
    raise _invalid(f"tool_choice names {name!r:.80}, which is not among the tools", "tool_choice")


def _calls_schema(tools: Sequence[dict[str, Any]], *, is_single: bool) -> dict[str, Any]:
    """An array of calls. The parameters of each function are a definition, in which references start from there."""
    definitions, calls = {}, []
    for index, tool in enumerate(tools):
        root = f"#/$defs/tool{index}"
        definitions[f"tool{index}"] = _moved(tool["function"].get("parameters") or _ANY_ARGUMENTS, root)
        call = {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, "parameters": {"$ref": root}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        calls.append(call)
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    return {**schema, "maxItems": 1} if is_single else schema


def _moved(schema: Any, root: str) -> Any:
    """`schema` with its references to itself changed to where it is now."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved


def _check_tools(tools: Any) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise _invalid(f"tools must be a list of at most {MAX_TOOLS}", "tools")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        param = f"tools[{index}]"
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise _invalid(f"{param} must be an object with type 'function' and a function", param)
        function = tool["function"]
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _invalid(f"{param}.function.name must be 1 to 64 of A-Z a-z 0-9 _ . -", f"{param}.function.name")
        if name in names:
            raise _invalid(f"{param}.function.name {name!r} is there twice", f"{param}.function.name")
        names.add(name)
        for key, kind in (("parameters", dict), ("description", str)):
            if function.get(key) is not None and not isinstance(function[key], kind):
                raise _invalid(f"{param}.function.{key} is of the wrong type", f"{param}.function.{key}")
    return tools


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_tools")
