"""The seam between the loader and the formats, and what the formats have in common.

The tensors themselves say which layers are packed: one that `modules_to_not_convert` or `ignore` names is stored as
floats, and so is read like any other. A format never sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from trivium.errors import ConfigurationError

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

    def weight(self, layer: str, in_features: int, tensors: StoredTensors) -> Tensor:
        """The weight of a packed layer as float32 [out_features, in_features]. Raises ConfigurationError."""
        ...


def unpack(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """int32 [rows, words] -> unsigned values as int32 [rows, words * (32 / bits)].

    Value i of a word is in its bits [i * bits, (i + 1) * bits), or with `order` the value at order[i].
    """
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
    values = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)  # [rows, words, values per word]
    return (values if order is None else values[..., list(order)]).flatten(1)


def grouped_weight(layer: str, values: Tensor, zeros: Tensor | int, scales: Tensor, groups: Tensor) -> Tensor:
    """(values - zeros) * scales, with zeros and scales of the group of each input.

    values [out, in] int32, zeros [out, num_groups] int32 or one for all, scales [out, num_groups], groups [in].
    Raises ConfigurationError if the shapes do not fit.
    """
    out_features, in_features = values.shape
    num_groups = scales.shape[1]
    if len(scales) != out_features or (isinstance(zeros, Tensor) and zeros.shape != scales.shape):
        shapes = [list(part.shape) for part in (scales, zeros) if isinstance(part, Tensor)]
        raise ConfigurationError(f"{layer}: scales and zero points {shapes} do not fit {out_features} outputs")
    if groups.shape != (in_features,) or not 0 <= int(groups.min()) <= int(groups.max()) < num_groups:
        raise ConfigurationError(f"{layer}: its {in_features} inputs do not fit {num_groups} groups")
    steps = values - (zeros if isinstance(zeros, int) else zeros[:, groups])
    return steps.float().mul_(scales.float()[:, groups])


def group_index(in_features: int, group_size: int) -> Tensor:
    """[in_features] the group of each input; -1 is one group for all."""
    return torch.arange(in_features) // (in_features if group_size == -1 else group_size)
