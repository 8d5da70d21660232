"""Embeddings that take the place of tokens in a prompt, once they have been checked.

`prompt_embeds.py` makes them of what callers give. Standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

Places: TypeAlias = tuple[tuple[int, int], ...]

MAX_EMBEDS_BYTES = 48 * 2**20  # of one prompt, as float32: it has to fit into a message
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class RawTensor:
    """Numbers as bytes, row by row and little-endian, with what they are said to be. Nothing is checked."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """Checked embeddings: float32, little-endian, [num_tokens, hidden_size]. digests: 16 bytes for each token.

    places: the positions [start, end) of the prompt that they are for, in rising order; None if they are all of it.
    """

    data: bytes = field(repr=False)
    num_tokens: int
    hidden_size: int
    digests: bytes = field(repr=False, compare=False)
    places: Places | None = None

    @classmethod
    def of(cls, data: bytes, num_tokens: int, hidden_size: int) -> PromptEmbeds:
        """With digests, which take time in proportion to the data."""
        view, width = memoryview(data), 4 * hidden_size
        digests = (
            hashlib.blake2b(view[start : start + width], digest_size=_DIGEST_BYTES).digest()
            for start in range(0, len(data), width)
        )
        return cls(data, num_tokens, hidden_size, b"".join(digests))

    @property
    def spans(self) -> Places:
        """`places`, whatever they are."""
        return ((0, self.num_tokens),) if self.places is None else self.places

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """What stands for the tokens where ids are listed; they mean nothing."""
        return (0,) * self.num_tokens

    @classmethod
    def joined(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """The rows of all `parts`, at least one, which have one width."""
        if len(parts) == 1:
            return parts[0]
        data = b"".join(part.data for part in parts)
        num_tokens = sum(part.num_tokens for part in parts)
        return cls(data, num_tokens, parts[0].hidden_size, b"".join(part.digests for part in parts))

    def parts(self) -> list[PromptEmbeds]:
        """The rows of each place, alone."""
        found, first, width = [], 0, 4 * self.hidden_size
        for start, end in self.spans:
            last = first + end - start
            data, digests = self.data[first * width : last * width], self.digests
            digests = digests[first * _DIGEST_BYTES : last * _DIGEST_BYTES]
            found.append(PromptEmbeds(data, end - start, self.hidden_size, digests))
            first = last
        return found

    def at(self, places: Places | None) -> PromptEmbeds:
        """The same rows in other places."""
        return replace(self, places=places)

    def behind(self, num_tokens: int) -> PromptEmbeds:
        """The same, of a prompt with `num_tokens` more tokens ahead of it."""
        return replace(self, places=tuple((start + num_tokens, end + num_tokens) for start, end in self.spans))

    def rows_from(self, position: int) -> bytes:
        """The embeddings of the tokens from `position` of the prompt on."""
        num_before = sum(min(end, position) - start for start, end in self.spans if start < position)
        return self.data if num_before == 0 else self.data[4 * self.hidden_size * num_before :]

    def digests_of(self, start: int, end: int) -> bytes:
        """What identifies the embeddings of the tokens [start, end) of the prompt, and which of these have some."""
        pieces, first_row = [], 0
        for low, high in self.spans:
            begin, stop = max(low, start), min(high, end)
            if begin < stop:
                row = first_row + begin - low
                pieces.append(b"%d-%d:" % (begin - start, stop - start))
                pieces.append(self.digests[_DIGEST_BYTES * row : _DIGEST_BYTES * (row + stop - begin)])
            first_row += high - low
        return b"".join(pieces)
