"""Penalties for tokens that a sequence has already, and the counts of tokens that they need.

For every token of prompt or output, how often does not matter (https://arxiv.org/abs/1909.05858):

    logit = logit * repetition if logit < 0 else logit / repetition

then for every token of the output, as OpenAI has them:

    logit = logit - count * frequency - presence
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What the sequences in some slots hold; changed by CountTokens, and zeroed by whoever gives a slot away.

    in_prompt: [num_slots, ceil(vocab_size / 32)] int32, bit t % 32 of word t // 32 for token t.
    in_output: [num_slots, vocab_size] int32, how often.
    """

    in_prompt: Tensor
    in_output: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Of each row, [num_rows] float32. Neutral are repetition 1, frequency 0 and presence 0."""

    repetition: Tensor
    frequency: Tensor
    presence: Tensor


class CountTokens(Protocol):
    def __call__(self, counts: TokenCounts, slots: Tensor, token_ids: Tensor, *, of_output: bool) -> None:
        """Add token_ids[i] to the sequence in slots[i], as part of its output or of its prompt; in place.

        slots, token_ids: [num_tokens] int64, in any order, tokens may come more than once. A negative slot fills up a
        list of fixed size; ids that the model does not have are left out.
        """
        ...


class ApplyPenalties(Protocol):
    def __call__(self, logits: Tensor, counts: TokenCounts, slots: Tensor, penalties: Penalties) -> None:
        """Change `logits` [num_rows, vocab_size] in place. slots: [num_rows] int64, where the sequence of each row is.

        A neutral row costs three loads.
        """
        ...
