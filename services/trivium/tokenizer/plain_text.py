"""Special tokens in what a user says are text: `</s>` in a message must not end it, nor begin the next speaker's.

A chat template writes special tokens as text, and so could whoever wrote a message. So those in messages are marked
before the template runs, which lets the two be told apart in the rendered text; so are beginnings of them at the end of
a text, which a template may put another one behind. Only chats that hold such text pay for
it; the others are encoded as ever.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from trivium.token_bytes import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNTRUSTED_ROLES = frozenset({"user", "tool"})
_MARK, _NAME = "\ufdd0", "\ufdd1"  # stand in no text: they are for use inside programs (Unicode 23.7)
_WORDS = ("role", "type")  # names of what is one of a few words, which templates compare

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
        texts = [text for text in self._ids if len(text) > 1]
        self._special = re.compile(_longest_of(texts) if texts else "(?!)")
        self._beginnings = frozenset(text[:end] for text in texts for end in range(1, len(text)))
        self._max_chars = max(map(len, texts), default=0)
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
            return self._mark_text(value)
        if isinstance(value, Mapping):
            new: Any = {name: item if name in _WORDS else self._mark(item) for name, item in value.items()}
            return value if all(new[name] is value[name] for name in value) else new
        if isinstance(value, (list, tuple)):
            new = [self._mark(item) for item in value]
            return value if all(item is old for item, old in zip(new, value, strict=True)) else new
        return value

    def _mark_text(self, text: str) -> str:
        """Special tokens in `text`, and at its end what the text that a template puts behind it could make one."""
        if self._special.search(text):
            text = self._special.sub(lambda found: f"{found[0][0]}{_MARK}{found[0][1:]}", text)
        end = len(text.rstrip())
        if any(text[start:end] in self._beginnings for start in range(max(0, end - self._max_chars), end)):
            text = f"{text[:end]}{_MARK}{text[end:]}"
        return text


def _longest_of(texts: Collection[str]) -> str:
    """A pattern of the longest of `texts`, which looks at each character once: there may be thousands of them."""
    low, high = min(texts), max(texts)
    num_common = next(
        (index for index, pair in enumerate(zip(low, high, strict=False)) if len(set(pair)) > 1), len(low)
    )
    start = low[:num_common]
    rests = [text[num_common:] for text in texts]
    branches = [_longest_of(list(group)) for _, group in groupby(sorted(filter(None, rests)), key=lambda rest: rest[0])]
    if not branches:
        return re.escape(start)
    return f"{re.escape(start)}(?:{'|'.join(branches)}){'?' if '' in rests else ''}"


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
