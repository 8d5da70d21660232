"""Log-probabilities of one token per row, its rank, and the most likely tokens, without a log_softmax in memory.

logprob[t] = logit[t] - log(sum_s exp(logit[s]))

For the tokens of a prompt, whose logits would be larger than a model, call it for some rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class GatheredLogprobs:
    """logprobs [num_rows] float32 and ranks [num_rows] int64 of the tokens asked for; rank: 1 + how many are likelier.

    top_logprobs float32 and top_token_ids int64 [num_rows, num_top], most likely first, equal ones in the order of the
    vocabulary.
    """

    logprobs: Tensor
    ranks: Tensor
    top_logprobs: Tensor
    top_token_ids: Tensor


class GatherLogprobs(Protocol):
    def __call__(self, logits: Tensor, token_ids: Tensor, *, num_top: int) -> GatheredLogprobs:
        """logits [num_rows, vocab_size], which stay as they are; token_ids [num_rows] int64; num_top <= vocab_size."""
        ...
