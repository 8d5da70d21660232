"""A number added to the logits of some tokens of some rows."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AddLogitBias(Protocol):
    def __call__(self, logits: Tensor, rows: Tensor, token_ids: Tensor, biases: Tensor) -> None:
        """logits[rows[i], token_ids[i]] += biases[i], in place, for `logits` [num_rows, vocab_size].

        rows, token_ids: [num_biases] int64, no pair twice; biases: [num_biases] float32. A pair with a negative row
        fills up a list of fixed size; ids that the model does not have are left out.
        """
        ...
