"""Helpers for chats offline. Templates from here are the caller's own: a server takes none from its clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.errors import InvalidRequestError
from trivium.inputs import ExplicitEncoderDecoderPrompt

_JINJA = ("{{", "{%", "{#", "\n")


def load_chat_template(chat_template: str | Path | None) -> str | None:
    """The template in the file `chat_template`; a text that is a template itself is returned as it is.

    Raises InvalidRequestError if it is neither.
    """
    if chat_template is None:
        return None
    if isinstance(chat_template, str) and any(mark in chat_template for mark in _JINJA):
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text()
    except (OSError, UnicodeDecodeError):
        raise InvalidRequestError(
            f"chat_template is neither a template nor a file that can be read: {str(chat_template)!r:.200}",
            param="chat_template",
        ) from None


def encoder_decoder_chat(messages: Sequence[Mapping[str, Any]], *, continues: bool) -> ExplicitEncoderDecoderPrompt:
    """A chat as an encoder-decoder model reads it, whose content is a prompt, such as text.

    The last user message is the encoder input; a final message that `continues` is the decoder prompt. Raises
    InvalidRequestError if no user has said anything.
    """
    sources = [message["content"] for message in messages if message["role"] == "user"]
    if not sources:
        raise InvalidRequestError(
            "an encoder-decoder model needs a user message", param="messages", code="invalid_messages"
        )
    return ExplicitEncoderDecoderPrompt(
        encoder_prompt=sources[-1], decoder_prompt=messages[-1]["content"] if continues else None
    )
