"""Where embeddings are in a rendered chat: a token of its own in place of each, in a copy of the tokenizer.

As special tokens they are never merged with what stands beside them, and a template carries them along as text.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trivium.chat_embeds import MAX_PARTS, is_embeds_part
from trivium.errors import InvalidRequestError
from trivium.tokenizer.plain_text import PlainText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[["PreTrainedTokenizerBase", str], list[int]]  # of one text, without special tokens around it

_PREFIX = "<|trivium_embeds_"
MARKS = tuple(f"{_PREFIX}{index}|>" for index in range(MAX_PARTS))


class EmbedsMarks:
    """Owner: the Tokenizer. The copy is made at the first use; several threads may come at once."""

    def __init__(self, backend: PreTrainedTokenizerBase) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._marked: tuple[PreTrainedTokenizerBase, dict[int, int]] | None = None
        self._plain_text: PlainText | None = None

    def encode(self, text: str, num_marks: int, encode: Encode | None) -> list[int]:
        """Token ids of a rendered chat, -1 - k for the k-th mark.

        encode: None where `PlainText` has marked special tokens in the text.

        Raises InvalidRequestError unless each of the marks is there once.
        """
        marked, numbers = self._copy()
        ids = self._marked_plain_text(marked).encode(text) if encode is None else encode(marked, text)
        if sorted(numbers[token_id] for token_id in ids if token_id in numbers) != list(range(num_marks)):
            raise InvalidRequestError(
                "the model's chat template cannot render these messages: it drops or repeats embeddings",
                param="messages",
                code="template_error",
            )
        return [-1 - numbers[token_id] if token_id in numbers else token_id for token_id in ids]

    def _marked_plain_text(self, marked: PreTrainedTokenizerBase) -> PlainText:
        with self._lock:
            self._plain_text = self._plain_text or PlainText(marked)
            return self._plain_text

    def _copy(self) -> tuple[PreTrainedTokenizerBase, dict[int, int]]:
        """The tokenizer that knows the marks, and token id -> number of each."""
        with self._lock:
            if self._marked is None:
                from transformers import AddedToken

                backend = copy.deepcopy(self._backend)
                tokens = [AddedToken(mark, normalized=False, special=True) for mark in MARKS]
                backend.add_tokens(tokens, special_tokens=True)
                ids: list[int] = backend.convert_tokens_to_ids(list(MARKS))  # type: ignore[assignment]
                self._marked = backend, {token_id: number for number, token_id in enumerate(ids)}
            return self._marked


def put_marks(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """`messages` with text parts in place of the parts that are embeddings, and how many these are.

    Raises InvalidRequestError for a text that spells a mark.
    """
    count = 0
    marked: list[Mapping[str, Any]] = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = []
            for part in content:
                if is_embeds_part(part) and count < MAX_PARTS:
                    part = {"type": "text", "text": MARKS[count]}
                    count += 1
                elif _PREFIX in str(part.get("text") if isinstance(part, Mapping) else part):
                    raise _reserved(index)
                parts.append(part)
            message = {**message, "content": parts}
        elif isinstance(content, str) and _PREFIX in content:
            raise _reserved(index)
        marked.append(message)
    return marked, count


def has_embeds(messages: Sequence[Mapping[str, Any]]) -> bool:
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    return any(is_embeds_part(part) for content in contents if isinstance(content, (list, tuple)) for part in content)


def _reserved(index: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"messages[{index}] spells {_PREFIX}, which stands for embeddings",
        param=f"messages[{index}].content",
        code="invalid_messages",
    )
