"""Low-rank updates of a linear layer, of many adapters in one batch: y[rows] += (x[rows] A^T) B^T for groups of rows.

https://arxiv.org/abs/2106.09685; rows grouped by adapter as in https://arxiv.org/abs/2310.18547. The scaling of an
adapter is part of its B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoraExpand:
    """B [width, rank] of the outputs [start, start + width), for the values [first_rank, first_rank + rank) of `x A^T`.

    A layer that is several layers in one has one for each of them that the adapter changes.
    """

    start: int
    first_rank: int
    matrix: Tensor


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter in one layer. shrink: all its A's, stacked [sum of ranks, in_features]."""

    shrink: Tensor
    expand: tuple[LoraExpand, ...]


class AddLora(Protocol):
    def __call__(self, y: Tensor, x: Tensor, groups: Sequence[tuple[Tensor | None, LoraWeights]]) -> None:
        """Change `y` [num_rows, out_features] in place, by `x` [num_rows, in_features].

        groups: rows [num_rows_of_group] int64, each in one group at most, or None for all rows; and their weights.
        """
        ...
