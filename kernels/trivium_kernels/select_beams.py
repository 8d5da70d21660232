"""One step of beam search on logits: the best continuations of every group of beams, and which of them go on.

For the beams b of a group and every token t: sum[b, t] = score[b] + logprob[b, t]. The candidates of a group are its
`num_candidates` largest sums; equal ones are in the order of beams, then of falling log-probability, then of tokens. Of
these the `width` best go on that do not end; one that ends counts as its sum - 1e9, so that it goes on, for nothing,
only where too few others are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BeamRows:
    """The groups of a step, as many as there may be; those with fewer beams than `max_width` leave places empty.

    rows: [num_groups, max_width] int64, the row of `logits` of each beam, negative in empty places, which come last;
    beams may have a row in common. scores: [num_groups, max_width] float32 or float64. num_candidates: [num_groups]
    int64. end_token_ids: [num_groups, max_ends] int64, what ends a beam at this step, filled up with negative numbers.
    all_end: [num_groups] bool, whether every token does.
    """

    rows: Tensor
    scores: Tensor
    num_candidates: Tensor
    end_token_ids: Tensor
    all_end: Tensor


@dataclass(frozen=True, slots=True)
class BeamSelection:
    """Candidates, best first: scores float32, beams and token_ids int64, [num_groups, max_candidates].

    What goes on, best first: parents and next_token_ids int64, next_scores float64, [num_groups, max_width]. Places
    behind those of a group have the score -inf and token 0; they go on from themselves.
    """

    scores: Tensor
    beams: Tensor
    token_ids: Tensor
    parents: Tensor
    next_token_ids: Tensor
    next_scores: Tensor


class SelectBeams(Protocol):
    def __call__(self, logits: Tensor, beams: BeamRows, *, max_candidates: int, normalize: bool) -> BeamSelection:
        """logits: [num_rows, vocab_size]; log-probabilities already, unless `normalize`. They stay as they are.

        max_candidates: no group's num_candidates is larger, nor its number of beams. A GPU compiles a kernel for each
        number of it and of places for beams, so both had better be few.
        """
        ...
