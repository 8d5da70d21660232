"""What every format stores, in one form: small numbers, and by group of inputs a scale and maybe a zero point.

The numbers stay as small as they are stored, or take a byte each. Whoever multiplies packed weights takes them from
here; whoever does not dequantizes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trivium.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """The weight (values - zeros) * scales, zeros and scales of the group of each input. Read only.

    values: [out_features, in_features], uint8 from 0 to 2 ** bits - 1, int8 from -2 ** (bits - 1) on, or floats of
    8 bits. zeros: integers [out_features, num_groups or 1], or one for all. scales: floats [out_features, num_groups].
    groups: int64 [in_features], the group of each input.
    """

    bits: int
    values: Tensor
    zeros: Tensor | int
    scales: Tensor
    groups: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def num_groups(self) -> int:
        return self.scales.shape[1]

    @property
    def zero_points(self) -> Tensor:
        """int32 [out_features, num_groups]."""
        if isinstance(self.zeros, Tensor):
            return self.zeros.int().expand(self.scales.shape)
        return torch.full(tuple(self.scales.shape), self.zeros, dtype=torch.int32)

    def dequantize(self) -> Tensor:
        """float32 [out_features, in_features], made anew."""
        weight = self.values.to(torch.float32, copy=True)
        if isinstance(self.zeros, Tensor):
            weight = weight.sub_(self._of_inputs(self.zeros))
        elif self.zeros:
            weight = weight.sub_(self.zeros)
        return weight.mul_(self._of_inputs(self.scales))

    def rows(self, ranges: Sequence[slice]) -> GroupedWeight:
        """The outputs in `ranges`, one range behind the other."""
        if list(ranges) == [slice(0, len(self.values))]:
            return self
        values, scales = (torch.cat([part[each] for each in ranges]) for part in (self.values, self.scales))
        zeros = self.zeros
        if isinstance(zeros, Tensor):
            zeros = torch.cat([zeros[each] for each in ranges])
        return replace(self, values=values, zeros=zeros, scales=scales)

    def columns(self, columns: slice) -> GroupedWeight:
        """These inputs, with the groups that they are of."""
        if columns == slice(0, self.values.shape[1]):
            return self
        used, groups = torch.unique(self.groups[columns], return_inverse=True)
        zeros = self.zeros
        if isinstance(zeros, Tensor) and zeros.shape[1] > 1:
            zeros = zeros[:, used]
        return replace(self, values=self.values[:, columns], zeros=zeros, scales=self.scales[:, used], groups=groups)

    def _of_inputs(self, numbers: Tensor) -> Tensor:
        """float32 [out_features, num_groups] -> what can be joined to [out_features, in_features]."""
        return numbers.float() if numbers.shape[1] == 1 else numbers.float()[:, self.groups]


def grouped_weight(
    layer: str, values: Tensor, zeros: Tensor | int, scales: Tensor, groups: Tensor, *, bits: int
) -> GroupedWeight:
    """Raises ConfigurationError, naming the layer, if the shapes do not fit."""
    out_features, in_features = values.shape
    if len(scales) != out_features or (isinstance(zeros, Tensor) and zeros.shape != scales.shape):
        shapes = [list(part.shape) for part in (scales, zeros) if isinstance(part, Tensor)]
        raise ConfigurationError(f"{layer}: scales and zero points {shapes} do not fit {out_features} outputs")
    num_groups = scales.shape[1]
    if groups.shape != (in_features,) or not 0 <= int(groups.min()) <= int(groups.max()) < num_groups:
        raise ConfigurationError(f"{layer}: its {in_features} inputs do not fit {num_groups} groups")
    return GroupedWeight(bits, values, zeros, scales, groups)


def scaled_weight(
    layer: str,
    values: Tensor,
    scale: Tensor,
    block: tuple[int, int] | None,
    zeros: Tensor | int = 0,
    *,
    bits: int = 8,
) -> GroupedWeight:
    """values [out, in] with one scale, one for each output, or one for each `block` of (rows, columns).

    zeros: of the tensor or of each output. Raises ConfigurationError, naming the layer, if the scales do not fit.
    """
    out_features, in_features = values.shape
    groups = torch.zeros(in_features, dtype=torch.long)
    if isinstance(zeros, Tensor):
        if zeros.numel() not in (1, out_features):
            raise ConfigurationError(f"{layer}: zero points {list(zeros.shape)} do not fit {out_features} outputs")
        zeros = zeros.reshape(-1, 1).expand(out_features, 1)
    if scale.numel() == 1:
        return GroupedWeight(bits, values, zeros, scale.reshape(1, 1).expand(out_features, 1), groups)
    if block is not None:
        rows, columns = block
        if tuple(scale.shape) == (-(-out_features // rows), -(-in_features // columns)):
            scales = scale.repeat_interleave(rows, 0)[:out_features]
            return GroupedWeight(bits, values, zeros, scales, torch.arange(in_features) // columns)
    elif tuple(scale.shape) in ((out_features,), (out_features, 1)):
        return GroupedWeight(bits, values, zeros, scale.reshape(-1, 1), groups)
    raise ConfigurationError(f"{layer}: scales {list(scale.shape)} do not fit a weight {[out_features, in_features]}")
