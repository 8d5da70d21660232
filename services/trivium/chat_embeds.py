"""Embeddings in the middle of a chat: content parts of type "prompt_embeds", beside parts of type "text".

The template is rendered around a mark in place of each, and the tokenizer says where it is among the tokens: the k-th
part of a chat is the id -1 - k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trivium.errors import InvalidRequestError
from trivium.inputs import EmbedsPrompt, MixedPrompt, Prompt, TokensPrompt

PART_TYPE = "prompt_embeds"
MAX_PARTS = 64  # of one chat
_VALUE_KEYS = ("prompt_embeds", "data")  # the second is vLLM's

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class EmbedsPart:
    """What a part holds, and where it stands in the request."""

    value: Any
    param: str


def is_embeds_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == PART_TYPE


def take_embeds(messages: Messages) -> tuple[list[dict[str, Any]], list[EmbedsPart]]:
    """`messages` with nothing but their type in the parts that are embeddings, and what was in these, in their order.

    Raises InvalidRequestError.
    """
    taken: list[EmbedsPart] = []
    cleared = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, (list, tuple)) and any(map(is_embeds_part, content)):
            parts = []
            for place, part in enumerate(content):
                if is_embeds_part(part):
                    taken.append(_read(part, f"messages[{index}].content[{place}]"))
                    part = {"type": PART_TYPE}
                parts.append(part)
            message = {**message, "content": parts}
        cleared.append(dict(message))
    if len(taken) > MAX_PARTS:
        raise InvalidRequestError(
            f"{len(taken)} parts are embeddings, at most {MAX_PARTS} are taken",
            param="messages",
            code="too_many_prompts",
        )
    return cleared, taken


def _read(part: Mapping[str, Any], param: str) -> EmbedsPart:
    keys = [key for key in _VALUE_KEYS if part.get(key) is not None]
    if len(keys) != 1:
        raise InvalidRequestError(
            f"{param} must have its embeddings in one of {', '.join(_VALUE_KEYS)}",
            param=param,
            code="invalid_prompt_embeds",
        )
    return EmbedsPart(part[keys[0]], f"{param}.{keys[0]}")


def chat_prompt(ids: Sequence[int], embeds: Sequence[Any]) -> Prompt:
    """The prompt of a rendered chat: `ids` with `embeds`, in the places of their marks."""
    parts: list[Any] = []
    own: list[int] = []
    for token_id in ids:
        if token_id >= 0:
            own.append(token_id)
            continue
        parts += [TokensPrompt(prompt_token_ids=own)] if own else []
        parts.append(EmbedsPrompt(prompt_embeds=embeds[-1 - token_id]))
        own = []
    if not parts:
        return TokensPrompt(prompt_token_ids=own)
    return MixedPrompt(prompt_parts=[*parts, TokensPrompt(prompt_token_ids=own)] if own else parts)


def encoder_decoder_content(content: Any, embeds: Sequence[Any], first: int) -> Any:
    """What an encoder-decoder model reads of a message: its text, or its embeddings, which nothing may stand beside.

    first: the number of the first part of the message that is embeddings.
    """
    if not isinstance(content, (list, tuple)) or not any(map(is_embeds_part, content)):
        return content
    if len(content) > 1:
        raise InvalidRequestError(
            "a message for an encoder-decoder model is text or one part of embeddings, not both",
            param="messages",
            code="unsupported_content",
        )
    return EmbedsPrompt(prompt_embeds=embeds[first])


def with_embeds(messages: Messages, embeds: Sequence[Any]) -> list[dict[str, Any]]:
    """`messages`, cleared of `embeds`, as an encoder-decoder model reads them."""
    read, first = [], 0
    for message in messages:
        content = message.get("content")
        read.append({**message, "content": encoder_decoder_content(content, embeds, first)})
        first += sum(map(is_embeds_part, content)) if isinstance(content, (list, tuple)) else 0
    return read
