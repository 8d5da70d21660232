"""Special tokens in what a user says are text: `</s>` in a message must not end it, nor begin the next speaker's.

A chat template writes special tokens as text, and so could whoever wrote a message. So those in messages are marked
before the template runs, which lets the two be told apart in the rendered text. Only chats that hold such text pay for
it; the others are encoded as ever.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trivium.token_bytes import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNTRUSTED_ROLES = frozenset({"user", "tool"})
_MARK, _NAME = "\ufdd0", "\ufdd1"  # stand in no text: they are for use inside programs (Unicode 23.7)

Messages = Sequence[Mapping[str, Any]]


class PlainText:
    """Marks and encodes for one tokenizer, of which it makes a changed copy when it first has to. May be shared."""

    def __init__(self, backend: PreTrainedTokenizerBase) -> None:
        from transformers import TokenizersBackend

        self._backend = backend
        ids = special_ids(backend) if isinstance(backend, TokenizersBackend) else frozenset()
        added = backend.added_tokens_decoder
        # text of a special token -> its id; where there are none, nothing is ever found
        self._ids = {added[token_id].content: token_id for token_id in ids.intersection(added)}
        texts = sorted((text for text in self._ids if len(text) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._encoder: _MarkedEncoder | None = None
        self._lock = threading.Lock()

    def mark(self, messages: Messages) -> Messages | None:
        """`messages` with marks, None if there is nothing to mark."""
        marked = [self._mark(message) if message.get("role") in UNTRUSTED_ROLES else message for message in messages]
        return None if all(new is old for new, old in zip(marked, messages, strict=True)) else marked

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered chat: what is marked is text, special tokens without a mark are special tokens."""
        with self._lock:
            self._encoder = self._encoder or _MarkedEncoder(self._backend, self._ids)
        text = text.replace(_NAME, "")
        return self._encoder.encode(self._special.sub(self._encoder.name_of, text))

    @staticmethod
    def unmark(text: str) -> str:
        """`text` as it would be shown."""
        return text.replace(_MARK, "")

    def _mark(self, value: Any) -> Any:
        """`value`, with marks in all of its texts; `value` itself if there are none."""
        if isinstance(value, str):
            if not self._special.search(value):
                return value
            return self._special.sub(lambda found: f"{found[0][0]}{_MARK}{found[0][1:]}", value)
        if isinstance(value, Mapping):
            new: Any = {name: self._mark(item) for name, item in value.items()}
            return value if all(new[name] is value[name] for name in value) else new
        if isinstance(value, (list, tuple)):
            new = [self._mark(item) for item in value]
            return value if all(item is old for item, old in zip(new, value, strict=True)) else new
        return value


class _MarkedEncoder:
    """A copy of a tokenizer to which special tokens are text, and other names mean those tokens."""

    def __init__(self, backend: PreTrainedTokenizerBase, ids: Mapping[str, int]) -> None:
        from tokenizers import AddedToken

        rust = self._rust = copy.deepcopy(backend).backend_tokenizer
        rust.encode_special_tokens = True
        rust.no_truncation()
        rust.no_padding()
        tokens = backend.added_tokens_decoder
        self._names = {text: f"{_NAME}{token_id}{_NAME}" for text, token_id in ids.items()}
        rust.add_tokens(
            [
                AddedToken(
                    self._names[text],
                    single_word=tokens[token_id].single_word,
                    lstrip=tokens[token_id].lstrip,
                    rstrip=tokens[token_id].rstrip,
                    normalized=False,
                )
                for text, token_id in ids.items()
            ]
        )
        rust.add_tokens([AddedToken(_MARK, normalized=False)])
        self._mark_id = rust.token_to_id(_MARK)
        self._special_ids = frozenset(ids.values()) - {backend.unk_token_id}
        self._meant = {rust.token_to_id(self._names[text]): token_id for text, token_id in ids.items()}  # id -> id

    def name_of(self, found: re.Match[str]) -> str:
        return self._names[found[0]]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, which holds marks and names."""
        ids = self._encode(text.replace(_MARK, ""))
        if not self._special_ids.isdisjoint(ids):  # a model of pieces may have them as pieces of text: cut them
            ids = self._encode(text)
        return [self._meant.get(token_id, token_id) for token_id in ids if token_id != self._mark_id]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._rust.encode(text, add_special_tokens=False).ids
        return ids
