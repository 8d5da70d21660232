"""What a grammar allows: logits[row, token] = -inf where the bit of the token is 0."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ApplyTokenBitmask(Protocol):
    def __call__(self, logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
        """Change `logits` [num_rows, vocab_size] in place: row rows[i] keeps the tokens whose bit in bitmask[i] is set.

        bitmask: [num_masks, ceil(vocab_size / 32)] int32, bit t % 32 of word t // 32 for token t. rows: [num_masks]
        int64, no row twice. The other rows are left alone. No logit is +inf or not a number.
        """
        ...
