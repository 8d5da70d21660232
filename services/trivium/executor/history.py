"""What rows have said so far, and where the ends of their sequences have occurred before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trivium.executor.input_batch import Bools, InputBatch, Longs
from trivium.executor.models.model import NOT_A_TOKEN

PAD = NOT_A_TOKEN
_NO_MATCH = -2


@dataclass(frozen=True, slots=True)
class History:
    """Sequences, prompt and output, of some rows of a batch, aligned at their ends.

    tokens: [num_rows, longest] with PAD before the first token, and for what has no token id: embeddings.
    num_tokens, num_prompt_tokens: [num_rows], without virtual tokens of soft prompts.
    encoder_token_ids: of each row, the input of its encoder; not needed where no parameter looks at it.
    """

    tokens: Longs
    num_tokens: Longs
    num_prompt_tokens: Longs
    encoder_token_ids: Sequence[Longs] = ()

    @classmethod
    def of(cls, batch: InputBatch, slots: Longs) -> History:
        num_tokens, num_virtual = batch.num_tokens[slots], batch.num_virtual_tokens[slots]
        longest = max(1, int((num_tokens - batch.num_leading[slots]).max()))
        positions = np.arange(longest) - longest + num_tokens[:, None]
        tokens = batch.token_ids[slots[:, None], np.maximum(positions, 0)].astype(np.int64)
        tokens[positions < 0] = PAD
        encoder_token_ids = [batch.encoder_token_ids[slot] for slot in slots]
        num_prompt_tokens = batch.num_prompt_tokens[slots] - num_virtual
        return cls(tokens, num_tokens - num_virtual, num_prompt_tokens, encoder_token_ids)

    def subset(self, rows: Longs) -> History:
        encoder_token_ids = [self.encoder_token_ids[row] for row in rows] if self.encoder_token_ids else ()
        return History(self.tokens[rows], self.num_tokens[rows], self.num_prompt_tokens[rows], encoder_token_ids)

    def pairs(self, *, only_output: bool = False) -> tuple[Longs, Longs]:
        """(row, token id) of every token."""
        wanted = self.tokens != PAD
        if only_output:
            wanted &= last(self.tokens.shape[1], self.num_tokens - self.num_prompt_tokens)
        rows, columns = np.nonzero(wanted)
        return rows, self.tokens[rows, columns]

    def encoder_tokens(self, rows: Longs) -> Longs:
        """[len(rows), longest] the encoder inputs of `rows`, aligned at their ends, with PAD before the first token."""
        inputs = [self.encoder_token_ids[row] for row in rows]
        tokens = np.full((len(rows), max(map(len, inputs), default=0)), PAD, np.int64)
        for index, token_ids in enumerate(inputs):
            tokens[index, tokens.shape[1] - len(token_ids) :] = token_ids
        return tokens

    def encoder_pairs(self, rows: Longs) -> tuple[Longs, Longs]:
        """(row, token id) of every token of the encoder inputs of `rows`."""
        inputs = [self.encoder_token_ids[row] for row in rows]
        inputs = [token_ids[token_ids != PAD] for token_ids in inputs]
        return np.repeat(rows, [len(token_ids) for token_ids in inputs]), np.concatenate(inputs)


def last(width: int, counts: Longs) -> Bools:
    """[len(counts), width] True for the last `counts[row]` columns."""
    mask: Bools = np.arange(width) >= width - counts[:, None]
    return mask


def suffix_matches(tokens: Longs, usable: Bools, max_lengths: Longs) -> tuple[Longs, Longs, Longs]:
    """Every place before the end where the last token of a row occurs, and how much of the row's end matches there.

    tokens, usable: [num_rows, width]; only usable tokens match. max_lengths: [num_rows], at least 1; longer matches are
    not told apart. Returns (rows, columns, lengths): tokens (column - length, column] equal the row's last `length`.
    """
    return _places(np.where(usable, tokens, PAD), np.where(usable, tokens, _NO_MATCH), max_lengths)


def encoder_matches(encoder: Longs, tokens: Longs, max_lengths: Longs) -> tuple[Longs, Longs, Longs]:
    """As `suffix_matches`, of the ends of `tokens` in `encoder`, the encoder inputs of the same rows."""
    return _places(encoder, np.where(tokens == PAD, _NO_MATCH, tokens), max_lengths)


def _places(earlier: Longs, suffix: Longs, max_lengths: Longs) -> tuple[Longs, Longs, Longs]:
    """Where in `earlier` [num_rows, any], before its last column, the ends of `suffix` [num_rows, any] occur."""
    width = min(earlier.shape[1], suffix.shape[1])
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
