"""From token ids to text while the ids are still arriving: whole characters only, stop strings found on the way.

Owns the state of one output stream and nothing else; it is a pure function of the ids pushed so far. How ids become
text is an argument (`decode`), so it knows no tokenizer library.

The text of a stream never depends on how its ids were cut into pushes: ids are taken one at a time inside.

    piece    text that one or more tokens add; a token that ends inside a character adds nothing yet
    held     the end of the text that may still turn out to be the beginning of a stop string
    skipped  text that a client received before a crash, produced again and dropped
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

REPLACEMENT = "\ufffd"
MAX_PENDING_TOKENS = 32

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Stop string `stop_index` was completed by token number `tokens_kept`, counted from 1 over all ids."""

    stop_index: int
    tokens_kept: int


class IncrementalDetokenizer:
    """Text of one output stream. Owned by whoever feeds it.

    `decode` turns ids into text, special tokens included; `is_silent` names the ids that never add text (special
    tokens that are to be skipped, ids without a token). Use: `replay` at most once, then `push` until it was given
    `final` or returned a match.

    Joined over all pushes the text equals `decode` of all ids that are not silent. Exceptions: it ends at a stop
    string, and bytes that are no valid UTF-8 may become another number of U+FFFD where `decode` itself looks further
    ahead than a character (byte fallback).
    """

    def __init__(
        self,
        decode: Decode,
        is_silent: Callable[[int], bool],
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
    ) -> None:
        self._pieces = _PieceDecoder(decode, is_silent)
        self._stops = _StopFinder(stop, include_stop_str_in_output)
        self._num_tokens = 0
        self._num_skipped_chars = 0  # still to be dropped
        self._unsent = ""
        self._match: StopMatch | None = None
        self._is_closed = False

    def replay(self, token_ids: Sequence[int], emitted_chars: int) -> None:
        """Take `token_ids` as already pushed, and the first `emitted_chars` characters of their text as delivered.

        Text beyond that, or a stop string in it, comes with the next push.
        """
        assert self._num_tokens == 0, "replay after a push"
        self._num_skipped_chars = emitted_chars
        self._unsent = self._take(token_ids, final=False)

    def push(self, token_ids: Sequence[int], *, final: bool = False) -> tuple[str, StopMatch | None]:
        """New text after `token_ids`, and the stop string that ended the stream, if one did.

        With `final` everything held back is delivered. Ids after a stop string are dropped. A push of no ids is
        allowed; a push after the end is not.
        """
        assert not self._is_closed, "push after the end of the stream"
        text = self._unsent
        self._unsent = ""
        if self._match is None:
            text += self._take(token_ids, final=final)
        self._is_closed = final or self._match is not None
        return text, self._match

    def _take(self, token_ids: Sequence[int], *, final: bool) -> str:
        released: list[str] = []
        for token_id in token_ids:
            self._num_tokens += 1
            piece = self._pieces.push(token_id)
            if piece:
                released.append(self._search(piece))
                if self._match is not None:
                    break
        if final and self._match is None:
            released.append(self._search(self._pieces.flush()))
            if self._match is None:
                released.append(self._stops.flush())
        return self._drop_skipped("".join(released))

    def _search(self, piece: str) -> str:
        text, stop_index = self._stops.push(piece)
        if stop_index is not None:
            self._match = StopMatch(stop_index, self._num_tokens)
        return text

    def _drop_skipped(self, text: str) -> str:
        dropped = min(self._num_skipped_chars, len(text))
        self._num_skipped_chars -= dropped
        return text[dropped:]


class _PieceDecoder:
    """Ids to text pieces that begin and end at a character. Owned by IncrementalDetokenizer.

    Decoders look to the left (a leading space is dropped at the very beginning only), so new ids are decoded together
    with the ids of the piece before them:

        ids     [0, num_context)            the piece before, its text is out
                [num_context, len(ids))     pending: they end inside a character, or have no text of their own

    Each id is decoded a bounded number of times, among at most MAX_PENDING_TOKENS others and one piece.
    """

    def __init__(self, decode: Decode, is_silent: Callable[[int], bool]) -> None:
        self._decode = decode
        self._is_silent = is_silent
        self._ids: list[int] = []
        self._num_context = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        """Text that became complete with `token_id`."""
        if self._is_silent(token_id):
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        piece = "" if text.endswith(REPLACEMENT) else self._beyond_context(text, len(self._ids))
        if piece:
            self._advance(len(self._ids))
        elif len(self._ids) - self._num_context >= MAX_PENDING_TOKENS:
            piece = self._release_long_pending()
        return piece

    def flush(self) -> str:
        """Text of the pending ids, an incomplete character as U+FFFD."""
        if self._num_context == len(self._ids):
            return ""
        return self._beyond_context(self._decode(self._ids), len(self._ids))

    def _beyond_context(self, text: str, end: int) -> str:
        """The pending part of `text`, which is the text of the first `end` ids."""
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # Byte fallback decodes a run of bytes as a whole: an invalid byte has undone the character before it.
        return self._decode(self._ids[self._num_context : end])

    def _advance(self, end: int) -> None:
        """Make the pending ids before `end` the context."""
        del self._ids[: self._num_context]
        self._num_context = end - self._num_context
        self._context_text = self._decode(self._ids[: self._num_context])

    def _release_long_pending(self) -> str:
        """Give up waiting: many U+FFFD in a row are the text itself, not one incomplete character.

        A cut inside a character makes several U+FFFD of it, so the best cut is the one with the shortest text.
        """

        def num_chars(cut: int) -> int:
            return len(self._decode(self._ids[self._num_context : cut])) + len(self._decode(self._ids[cut:]))

        end = min(range(len(self._ids) - 1, self._num_context, -1), key=num_chars)
        piece = self._beyond_context(self._decode(self._ids[:end]), end)
        self._advance(end)
        return piece


class _StopFinder:
    """Finds stop strings in text that comes in pieces. Owned by IncrementalDetokenizer.

    Of all stop strings that a piece completes the one that begins first wins, then the one listed first.
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool) -> None:
        assert all(stop), "a stop string is empty"
        self._stop = tuple(stop)
        self._include = include_stop_str_in_output
        self._first_chars = frozenset(text[0] for text in stop)
        self._max_len = max(map(len, stop), default=0)
        self._held = ""

    def push(self, piece: str) -> tuple[str, int | None]:
        """Text that can go out now, and the index of the stop string that ends it, if there is one."""
        if not self._stop:
            return piece, None
        text = self._held + piece
        found = [(start, index) for index, stop in enumerate(self._stop) if (start := text.find(stop)) >= 0]
        if found:
            start, index = min(found)
            return text[: start + len(self._stop[index])] if self._include else text[:start], index
        start = self._find_held(text)
        self._held = text[start:]
        return text[:start], None

    def flush(self) -> str:
        """What was held back: no more text comes."""
        held, self._held = self._held, ""
        return held

    def _find_held(self, text: str) -> int:
        """Where the longest end of `text` begins that is the beginning of a stop string; len(text) if none is."""
        for start in range(max(0, len(text) - self._max_len + 1), len(text)):
            if text[start] in self._first_chars:
                end = text[start:]
                if any(stop.startswith(end) for stop in self._stop):
                    return start
        return len(text)
