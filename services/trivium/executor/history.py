"""What rows have said so far, and where the ends of their sequences have occurred before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trivium.executor.input_batch import Bools, InputBatch, Longs

PAD = -1
_NO_MATCH = -2


@dataclass(frozen=True, slots=True)
class History:
    """Sequences, prompt and output, of some rows of a batch, aligned at their ends.

    tokens: [num_rows, longest] with PAD before the first token. num_tokens, num_prompt_tokens: [num_rows].
    """

    tokens: Longs
    num_tokens: Longs
    num_prompt_tokens: Longs

    @classmethod
    def of(cls, batch: InputBatch, slots: Longs) -> History:
        num_tokens = batch.num_tokens[slots]
        longest = int(num_tokens.max())
        positions = np.arange(longest) - longest + num_tokens[:, None]
        tokens = batch.token_ids[slots[:, None], np.maximum(positions, 0)].astype(np.int64)
        tokens[positions < 0] = PAD
        return cls(tokens, num_tokens, batch.num_prompt_tokens[slots])

    def subset(self, rows: Longs) -> History:
        return History(self.tokens[rows], self.num_tokens[rows], self.num_prompt_tokens[rows])

    def pairs(self, *, only_output: bool = False) -> tuple[Longs, Longs]:
        """(row, token id) of every token."""
        counts = self.num_tokens - self.num_prompt_tokens if only_output else self.num_tokens
        rows, columns = np.nonzero(last(self.tokens.shape[1], counts))
        return rows, self.tokens[rows, columns]


def last(width: int, counts: Longs) -> Bools:
    """[len(counts), width] True for the last `counts[row]` columns."""
    mask: Bools = np.arange(width) >= width - counts[:, None]
    return mask


def suffix_matches(tokens: Longs, usable: Bools, max_lengths: Longs) -> tuple[Longs, Longs, Longs]:
    """Every place before the end where the last token of a row occurs, and how much of the row's end matches there.

    tokens, usable: [num_rows, width]; only usable tokens match. max_lengths: [num_rows], at least 1; longer matches are
    not told apart. Returns (rows, columns, lengths): tokens (column - length, column] equal the row's last `length`.
    """
    earlier = np.where(usable, tokens, PAD)
    suffix = np.where(usable, tokens, _NO_MATCH)
    width = tokens.shape[1]
    rows, columns = np.nonzero(earlier[:, :-1] == suffix[:, -1:])
    lengths = np.ones(len(rows), np.int64)
    alive = np.arange(len(rows))
    for length in range(1, min(width, int(max_lengths.max(initial=1)))):
        alive = alive[(columns[alive] >= length) & (max_lengths[rows[alive]] > length)]
        matches = earlier[rows[alive], columns[alive] - length] == suffix[rows[alive], -1 - length]
        alive = alive[matches]
        if not len(alive):
            break
        lengths[alive] += 1
    return rows, columns, lengths
