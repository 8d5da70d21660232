"""Low-rank updates of a linear layer for a step of fixed size: the adapters lie in one tensor, padded to one rank.

The same as `add_lora`, for graphs that are recorded once: which rows have which adapter is in tensors, and so can
change between replays. y[row] += (x[row] A^T) B^T with the A and B of the row's adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trivium_kernels.add_lora import LoraWeights


@dataclass(frozen=True, slots=True)
class LoraStack:
    """The adapters of one layer, or of several that are stacked into one; parts are those layers.

    shrink: [num_adapters, num_parts * max_rank, in_features], the A's of part p in rows [p * max_rank, (p + 1) *
    max_rank). expand: [num_adapters, out_features, max_rank], the B's. Zeros where an adapter has less. bounds: part p
    has the outputs [bounds[p], bounds[p + 1]).
    """

    shrink: Tensor
    expand: Tensor
    bounds: tuple[int, ...]

    @property
    def max_rank(self) -> int:
        return self.expand.shape[2]

    def put(self, adapter: int, weights: LoraWeights) -> None:
        """Make `weights` adapter number `adapter`. Every part of `weights` is a part of the layer."""
        self.shrink[adapter].zero_()
        self.expand[adapter].zero_()
        for part in weights.expand:
            width, rank = part.matrix.shape
            first = self.bounds.index(part.start) * self.max_rank
            self.shrink[adapter, first : first + rank] = weights.shrink[part.first_rank : part.first_rank + rank]
            self.expand[adapter, part.start : part.start + width, :rank] = part.matrix


def new_stack(num_adapters: int, max_rank: int, in_features: int, widths: Sequence[int], like: Tensor) -> LoraStack:
    """Room for `num_adapters` adapters, all of them zero, in the type and on the device of `like`."""
    bounds = (0, *torch.tensor(widths).cumsum(0).tolist())
    return LoraStack(
        like.new_zeros((num_adapters, len(widths) * max_rank, in_features)),
        like.new_zeros((num_adapters, bounds[-1], max_rank)),
        bounds,
    )


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of a step by adapter: those of adapter a are order[starts[a] : starts[a + 1]].

    order: [num_rows] int64; the rows without an adapter come last. starts: [num_adapters + 1] int64.
    """

    order: Tensor
    starts: Tensor


def rows_by_adapter(adapters: Tensor, num_adapters: int) -> AdapterRows:
    """adapters: [num_rows] int64, the number of each row's adapter, negative for none. Waits for no device."""
    keys = torch.where(adapters < 0, num_adapters, adapters)
    order = keys.argsort(stable=True)
    numbers = torch.arange(num_adapters + 1, device=adapters.device)
    return AdapterRows(order, torch.searchsorted(keys[order], numbers))


class AddStackedLora(Protocol):
    def __call__(self, y: Tensor, x: Tensor, rows: AdapterRows, stack: LoraStack) -> None:
        """Change `y` [num_rows, out_features] in place, by `x` [num_rows, in_features]."""
        ...
