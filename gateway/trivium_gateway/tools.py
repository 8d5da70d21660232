"""Tools of a chat: checked, and shown to the model by its chat template.

What the model calls stands in its text as the template taught it to write calls; it is not parsed into `tool_calls`. So
a choice that must be a call ("required", or one function by name) is refused.
"""

from __future__ import annotations

import re
from typing import Any

from trivium.config import ModelInfo
from trivium.errors import InvalidRequestError
from trivium_gateway.openai_protocol import ChatCompletionRequest

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def shown_tools(tools: Any, tool_choice: Any) -> list[dict[str, Any]] | None:
    """The tools for the template: none with `tool_choice` "none". Raises InvalidRequestError."""
    checked = _check_tools(tools)
    if tool_choice in ("required",) or isinstance(tool_choice, dict):
        if not checked:
            raise _invalid("tool_choice needs tools", "tool_choice")
        raise InvalidRequestError(
            "tool_choice may be 'none' or 'auto': a call cannot be enforced",
            param="tool_choice",
            code="unsupported_parameter",
        )
    if tool_choice not in (None, "none", "auto"):
        raise _invalid(f"tool_choice must be 'none' or 'auto', got {tool_choice!r:.40}", "tool_choice")
    return None if tool_choice == "none" or not checked else checked


def refuse_template_fields(request: ChatCompletionRequest, info: ModelInfo) -> None:
    """Raise InvalidRequestError for what only a chat template could read."""
    for name in ("tools", "chat_template_kwargs"):
        if getattr(request, name):
            raise InvalidRequestError(
                f"{name} needs a chat template, {info.name} is an encoder-decoder model", param=name
            )


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
