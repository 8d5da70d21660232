"""Products with a weight that is packed once, in the layout that the processor reads fastest."""

from __future__ import annotations

from enum import IntEnum

from torch import Tensor

from trivium_kernels.cpu import _native
from trivium_kernels.cpu.addresses import rows_of
from trivium_kernels.cpu.memory import empty


class WeightType(IntEnum):
    """How weights are stored. Products are float32 with activations as they are, but for the last two.

    INT8: products of integers, with activations quantized row by row. BFLOAT16_PAIRS: products of bfloat16, to which
    activations are rounded, with sums in float32.
    """

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3
    BFLOAT16_PAIRS = 4


def can_pack(weight_type: WeightType) -> bool:
    """Whether this processor has a kernel for it."""
    return bool(_native.supports(weight_type))


class PackedWeight:
    """y = x weight^T + bias. Immutable; keeps the bias, and a copy of the weight in memory of its own.

    weight: [out_features, in_features] float32, rounded to `weight_type`. bias: [out_features] or None.
    """

    __slots__ = ("_bias", "_multiply", "_out_features", "_packed")

    def __init__(self, weight: Tensor, bias: Tensor | None, weight_type: WeightType) -> None:
        self._out_features, in_features = weight.shape
        weight = weight.float().contiguous()
        self._bias = None if bias is None else bias.float().contiguous()
        bias_address = 0 if self._bias is None else self._bias.data_ptr()
        self._packed = _native.pack(weight_type, weight.data_ptr(), bias_address, self._out_features, in_features)
        self._multiply = _native.multiply

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x [num_rows, in_features] -> [num_rows, out_features], with `add` of that shape added if it is given."""
        x = rows_of(x)
        num_rows = x.shape[0]
        y = empty((num_rows, self._out_features))
        if add is None:
            address, stride = 0, 0
        else:
            add = rows_of(add)
            address, stride = add.data_ptr(), add.stride(0)
        self._multiply(
            self._packed, x.data_ptr(), num_rows, x.stride(0), y.data_ptr(), self._out_features, address, stride
        )
        return y
