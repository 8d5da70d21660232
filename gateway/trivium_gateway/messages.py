"""The messages of a chat: checked, and reduced to what a chat template reads.

Kept per message: role, content (text parts joined by newlines, unless some are embeddings), name, tool_call_id,
tool_calls. Media parts are refused. Other fields are ignored, as they are at the top level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trivium.chat_embeds import is_embeds_part
from trivium.errors import InvalidRequestError
from trivium_gateway.errors import unsupported_parameter

MAX_MESSAGES = 2048
ROLES = ("system", "developer", "user", "assistant", "tool")

ChatMessageDict = dict[str, Any]  # keys: role, content, and where given name, tool_call_id, tool_calls

MAX_TOOL_CALLS = 128
_UNSUPPORTED_FIELDS = ("function_call", "audio")
_TEXT_PARTS = ("text", "input_text", "output_text")


def check_messages(messages: Any, *, takes_embeds: bool = False) -> list[ChatMessageDict]:
    """The messages as templates take them, with parts that are embeddings if `takes_embeds`.

    Raises InvalidRequestError that names the part that is wrong.
    """
    if messages is None:
        raise _invalid("messages is missing", "messages")
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages must be a non-empty list", "messages")
    if len(messages) > MAX_MESSAGES:
        raise _invalid(f"{len(messages)} messages, at most {MAX_MESSAGES} are taken", "messages")
    return [
        _check_message(message, f"messages[{index}]", takes_embeds=takes_embeds)
        for index, message in enumerate(messages)
    ]


def is_continuation(
    messages: Sequence[ChatMessageDict], *, add_generation_prompt: bool | None, continue_final_message: bool | None
) -> bool:
    """Whether the reply goes on with the final message, which must then be the assistant's.

    Raises InvalidRequestError where the two flags, or a flag and the final message, contradict each other.
    """
    is_assistant_last = messages[-1]["role"] == "assistant"
    if not continue_final_message:
        if add_generation_prompt and is_assistant_last:
            raise _invalid(
                "the final message is the assistant's: continue_final_message=true continues it, "
                "add_generation_prompt=true needs a message to answer",
                f"messages[{len(messages) - 1}].role",
            )
        return False
    if add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt cannot both be true",
            param="continue_final_message",
            code="conflicting_parameters",
        )
    if not is_assistant_last:
        raise _invalid(
            "continue_final_message needs a final message of the assistant", f"messages[{len(messages) - 1}].role"
        )
    return True


def _check_message(message: Any, param: str, *, takes_embeds: bool) -> ChatMessageDict:
    if not isinstance(message, dict):
        raise _invalid(f"{param} must be an object", param)
    role = message.get("role")
    if role not in ROLES:
        raise _invalid(f"{param}.role must be one of {', '.join(ROLES)}", f"{param}.role")
    for name in _UNSUPPORTED_FIELDS:
        if message.get(name):
            raise unsupported_parameter(f"{param}.{name}")
    calls = _check_calls(message.get("tool_calls"), role, f"{param}.tool_calls")
    content = "" if calls and message.get("content") is None else message.get("content")
    checked: ChatMessageDict = {"role": role, "content": _check_content(content, f"{param}.content", takes_embeds)}
    if calls:
        checked["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        value = message.get(name)
        if value is not None and not isinstance(value, str):
            raise _invalid(f"{param}.{name} must be text", f"{param}.{name}")
        if value is not None:
            checked[name] = value
    if role == "tool" and "tool_call_id" not in checked:
        raise _invalid(f"{param}.tool_call_id is missing", f"{param}.tool_call_id")
    return checked


def _check_calls(calls: Any, role: str, param: str) -> list[Any]:
    """The calls that an assistant made before."""
    if not calls:
        return []
    if role != "assistant" or not isinstance(calls, list) or len(calls) > MAX_TOOL_CALLS:
        raise _invalid(f"{param} must be a list of at most {MAX_TOOL_CALLS}, of an assistant", param)
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        fields = (function.get("name"), function.get("arguments")) if isinstance(function, Mapping) else (None, None)
        if not all(isinstance(field, str) for field in fields):
            raise _invalid(f"{param}[{index}] must have a function with name and arguments", f"{param}[{index}]")
    return calls


def _check_content(content: Any, param: str, takes_embeds: bool) -> str | list[Any]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _invalid(f"{param} must be text or a non-empty list of text parts", param)
    parts: list[Any] = []
    for index, part in enumerate(content):
        if is_embeds_part(part):
            if not takes_embeds:
                raise InvalidRequestError(
                    f"{param}[{index}] is of type prompt_embeds, which is not enabled",
                    param=f"{param}[{index}]",
                    code="feature_disabled",
                )
            parts.append(part)
        else:
            parts.append({"type": "text", "text": _check_part(part, f"{param}[{index}]")})
    if any(map(is_embeds_part, parts)):
        return parts
    return "\n".join(part["text"] for part in parts)


def _check_part(part: Any, param: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise _invalid(f"{param} must be an object with a type", param)
    if part["type"] not in _TEXT_PARTS:
        raise InvalidRequestError(
            f"{param} is of type {part['type'][:40]!r}: only text is supported", param=param, code="unsupported_content"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise _invalid(f"{param}.text must be text", f"{param}.text")
    return text


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_messages")
