"""From a chat to the text of a prompt, by the template that came with the model.

The template is the checkpoint's, the messages are a client's: transformers renders in a jinja sandbox, and the size of
what goes in and what comes out is bounded here. Rendering may take for ever, so those who render for clients do it in
a thread under a `TimeLimit` of MAX_RENDER_CPU_S.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from trivium.errors import InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAX_CHAT_BYTES = 8 * 2**20
MAX_MESSAGES = 8192
MAX_TOOLS = 1024
MAX_PROMPT_CHARS = 4 * 2**20
MAX_RENDER_CPU_S = 0.5
MAX_TEMPLATE_KWARGS = 64
CONTENT_FORMATS = ("auto", "string", "openai")
# what rendering itself is told; a caller's variables must not change it
RESERVED_KWARGS = frozenset(
    {
        "conversation",
        "messages",
        "chat_template",
        "template",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
    }
    | {"tokenize", "tokenizer", "tokenizer_kwargs", "padding", "truncation", "max_length", "processor_kwargs"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask", "self"}
)
_PARTS_LOOP = re.compile(r"for\s+\w+\s+in\s+\w+(?:\.content|\[['\"]content['\"]\])")

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    template: str | None = None,
    content_format: str = "auto",
) -> str:
    """The prompt text of a chat.

    template_kwargs: further variables of the template. template: instead of the model's own. content_format: "string"
    joins the parts of a content, "openai" makes a list of parts of every text, "auto" does what the template reads.

    Raises InvalidRequestError: code "no_chat_template" if the model has none, "template_error" if the template
    refuses the messages, "prompt_too_long" if the text is out of all proportion.
    """
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    check_messages(messages)
    check_tools(tools)
    check_template_kwargs(template_kwargs)
    if content_format not in CONTENT_FORMATS:
        raise InvalidRequestError(
            f"chat_template_content_format must be one of {', '.join(CONTENT_FORMATS)}, got {content_format!r:.40}",
            param="chat_template_content_format",
        )
    if not (template or tokenizer.chat_template):
        raise InvalidRequestError(
            "the model has no chat template; use completions instead", param="model", code="no_chat_template"
        )
    as_parts = content_format == "openai" or (
        content_format == "auto" and _reads_parts(template or tokenizer.chat_template)
    )
    try:
        text = tokenizer.apply_chat_template(
            [_for_template(message, as_parts=as_parts) for message in messages],
            chat_template=template,
            tools=[dict(tool) for tool in tools] if tools else None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **(template_kwargs or {}),
        )
    except InvalidRequestError:
        raise
    except Exception as error:  # a template may raise anything
        logger.info("chat template failed: %s", type(error).__name__)
        raise template_error() from error
    assert isinstance(text, str), f"the template gave {type(text).__name__}"
    if len(text) > MAX_PROMPT_CHARS:
        raise InvalidRequestError(
            f"the rendered chat has {len(text)} characters, at most {MAX_PROMPT_CHARS} are taken",
            param="messages",
            code="prompt_too_long",
        )
    return text


def template_error() -> InvalidRequestError:
    """The model's template cannot render this chat. What it said is not shown: it may quote anything."""
    return InvalidRequestError(
        "the model's chat template cannot render these messages", param="messages", code="template_error"
    )


def parse_messages(messages_json: bytes) -> list[dict[str, Any]]:
    """The message list of a request. Raises InvalidRequestError."""
    messages: list[dict[str, Any]] = _parse_json(messages_json, "messages")
    check_messages(messages)
    return messages


def parse_tools(tools_json: bytes) -> list[dict[str, Any]] | None:
    """The tool list of a request, None if there is none. Raises InvalidRequestError."""
    if not tools_json:
        return None
    tools: list[dict[str, Any]] = _parse_json(tools_json, "tools")
    check_tools(tools)
    return tools


def check_messages(messages: Any) -> None:
    """Raise InvalidRequestError unless `messages` is a list of 1 to MAX_MESSAGES objects, each with a role."""
    _check_objects(messages, "messages", 1, MAX_MESSAGES)
    for position, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise InvalidRequestError(
                f"messages[{position}] has no role", param=f"messages[{position}].role", code="invalid_messages"
            )


def check_tools(tools: Any) -> None:
    """Raise InvalidRequestError unless `tools` is None or a list of at most MAX_TOOLS objects."""
    if tools is not None:
        _check_objects(tools, "tools", 0, MAX_TOOLS)


def _parse_json(data: bytes, name: str) -> Any:
    if len(data) > MAX_CHAT_BYTES:
        raise InvalidRequestError(
            f"{name} has {len(data)} bytes, at most {MAX_CHAT_BYTES} are taken", param=name, code="prompt_too_long"
        )
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequestError(f"{name} is not valid JSON", param=name, code=f"invalid_{name}") from None


def _check_objects(items: Any, name: str, low: int, high: int) -> None:
    is_list = isinstance(items, Sequence) and not isinstance(items, (str, bytes))
    if not is_list or not low <= len(items) <= high or not all(isinstance(item, Mapping) for item in items):
        raise InvalidRequestError(
            f"{name} must be a list of {low} to {high} objects", param=name, code=f"invalid_{name}"
        )


def parse_template_kwargs(data: bytes) -> dict[str, Any] | None:
    """The template variables of a request, None if there are none. Raises InvalidRequestError."""
    if not data:
        return None
    kwargs: dict[str, Any] = _parse_json(data, "chat_template_kwargs")
    check_template_kwargs(kwargs)
    return kwargs


def check_template_kwargs(kwargs: Any) -> None:
    """Raise InvalidRequestError unless `kwargs` is None or names variables that a template may have of a caller."""
    if kwargs is None:
        return
    if not isinstance(kwargs, Mapping) or len(kwargs) > MAX_TEMPLATE_KWARGS:
        raise InvalidRequestError(
            f"chat_template_kwargs must be an object of at most {MAX_TEMPLATE_KWARGS} names",
            param="chat_template_kwargs",
        )
    for name in kwargs:
        if not isinstance(name, str) or not name.isidentifier() or name in RESERVED_KWARGS:
            raise InvalidRequestError(
                f"chat_template_kwargs must not have the name {name!r:.40}",
                param="chat_template_kwargs",
                code="template_not_allowed",
            )


def _reads_parts(template: object) -> bool:
    """Whether `template` goes through the parts of a content, and does not ask whether it is text."""
    return isinstance(template, str) and bool(_PARTS_LOOP.search(template)) and "is string" not in template


def _for_template(message: Mapping[str, Any], *, as_parts: bool) -> dict[str, Any]:
    """`message` as templates expect it, where that differs from the OpenAI form.

    Content is one text, or with `as_parts` a list of text parts; the arguments of a tool call, a JSON text in the
    protocol, become an object.
    """
    out = dict(message)
    if isinstance(out.get("content"), (list, tuple)):
        texts = _part_texts(out["content"])
        out["content"] = [{"type": "text", "text": text} for text in texts] if as_parts else "\n".join(texts)
    elif as_parts and isinstance(out.get("content"), str):
        out["content"] = [{"type": "text", "text": out["content"]}]
    if isinstance(out.get("tool_calls"), (list, tuple)):
        out["tool_calls"] = [_with_object_arguments(call) for call in out["tool_calls"]]
    return out


def _part_texts(parts: Sequence[Any]) -> list[str]:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise InvalidRequestError(
                "message content may be text or parts of type text", param="messages", code="unsupported_content"
            )
    return texts


def _with_object_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
