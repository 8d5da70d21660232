"""The seam between the loader and the formats, and what the formats have in common.

The tensors themselves say which layers are packed: one that `modules_to_not_convert` or `ignore` names is stored as
floats, and so is read like any other. A format never sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from trivium.executor.quantization.grouped_weight import GroupedWeight

WORD_BITS = 32
PACKABLE_BITS = (2, 4, 8)  # widths whose values never cross the border of a word


class StoredTensors(Protocol):
    """The tensors of a checkpoint as they are stored."""

    def __contains__(self, name: object) -> bool: ...

    def stored(self, name: str) -> Tensor:
        """Raises ConfigurationError if it is missing or cannot be read."""
        ...


class Quantization(Protocol):
    """How one checkpoint stores the weights of its linear layers."""

    def is_packed(self, layer: str, tensors: StoredTensors) -> bool:
        """Whether `layer`.weight is stored in this format."""
        ...

    def weight(self, layer: str, in_features: int, tensors: StoredTensors) -> GroupedWeight:
        """The weight [out_features, in_features] of a packed layer. Raises ConfigurationError."""
        ...


def unpack(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """int32 [rows, words] -> unsigned values as uint8 [rows, words * (32 / bits)].

    Value i of a word is in its bits [i * bits, (i + 1) * bits), or with `order` the value at order[i].
    """
    per_word = WORD_BITS // bits
    values = torch.empty((*words.shape, per_word), dtype=torch.uint8)
    for index, place in enumerate(order or range(per_word)):  # one by one: all of them in 32 bits would be large
        values[..., index] = (words >> (place * bits)) & ((1 << bits) - 1)
    return values.flatten(1)


def group_index(in_features: int, group_size: int) -> Tensor:
    """[in_features] the group of each input; -1 is one group for all."""
    return torch.arange(in_features) // (in_features if group_size == -1 else group_size)
