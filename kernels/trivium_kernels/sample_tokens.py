"""The draw of the next token: temperature, min-p, top-k, top-p, and one random number of each row.

With w[t] = exp((logit[t] - max) / temperature):

1. w[t] = 0 where w[t] < min_p * max(w).
2. Without top_k and top_p the tokens stay in the order of the vocabulary; else they are put in the order of falling w,
   equal ones in the order of the vocabulary. Then the first top_k tokens are kept; and of these as many, from the
   first one on, as it takes to reach top_p of their sum.
3. u is a number in (0, 1), the hash of (seed, choice_index, position) below. The result is the first kept token at
   which the running sum of w exceeds u times the sum of all that are kept.

A temperature of 0 takes the largest logit, the first of equals.

The hash is splitmix64 (https://doi.org/10.1145/2714064.2660195) over the three keys, its upper 48 bits plus a half. It
is integer arithmetic and the same on every device, bit for bit. w is float32, so two implementations can disagree about
a token where the random number, or one of the limits, is so near to a border that rounding moves it to the other side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSampling:
    """Of each row, [num_rows]. Neutral are top_k 0, top_p 1 and min_p 0.

    temperature, top_p, min_p: float32. top_k, seed, choice_index, position: int64.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    choice_index: Tensor
    position: Tensor


class SampleTokens(Protocol):
    def __call__(self, logits: Tensor, sampling: TokenSampling) -> Tensor:
        """One token per row of `logits` [num_rows, vocab_size], which stay as they are. Returns [num_rows] int64.

        A row whose logits are all -inf has no meaningful token; it gets the first one.
        """
        ...
