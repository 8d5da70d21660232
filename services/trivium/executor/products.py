"""Packed matrix products for a CPU: what `linear_tuning` chooses from.

Ours in C++ (`trivium_kernels.cpu`), and private operators of torch. Each is optional: `why_unavailable` tries it on
this processor. All read packed weights that are made once; arithmetic is float32, but for int8
and products of bfloat16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.executor.linear import Product

_LAYOUT_ROWS = 16  # oneDNN's layout for this many rows is as fast for all others; the one for 1 row is not
_MAX_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class Packing:
    """pack: weight [out_features, in_features] and bias -> product.

    weight_bytes: of a packed weight element. tolerance: the largest error against `linear`, as a share of the largest
    result, that a working operator makes with random numbers. fits: whether a weight may be packed so.
    """

    name: str
    pack: Callable[[Tensor, Tensor | None], Product]
    weight_bytes: int
    tolerance: float
    fits: Callable[[Tensor], bool] = lambda weight: True


def _adding(multiply: Callable[[Tensor], Tensor]) -> Product:
    """`multiply`, which returns a new tensor, as a Product."""

    def product(x: Tensor, add: Tensor | None = None) -> Tensor:
        y = multiply(x)
        return y if add is None else y.add_(add)

    return product


def _pack_plain(weight: Tensor, bias: Tensor | None) -> Product:
    return _adding(lambda x: F.linear(x, weight, bias))


def _pack_onednn(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _LAYOUT_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    no_scalars: list[Any] = []
    return _adding(lambda x: multiply(x, packed, bias, "none", no_scalars, ""))


def _pack_half(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default
    return _adding(lambda x: multiply(x, packed))


def _pack_int8(weight: Tensor, bias: Tensor | None) -> Product:
    """Weights symmetric per output row; activations per call, in 7 bits: 8 would overflow 16-bit sums on AVX2."""
    scales = weight.abs().amax(dim=1).clamp_(min=1e-12) / 127
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation")
        quantized = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, bias)
    multiply = torch.ops.quantized.linear_dynamic.default
    return _adding(lambda x: multiply(x, packed, True))


def _pack_native(weight_type: str) -> Callable[[Tensor, Tensor | None], Product]:
    """As a weight type of `trivium_kernels.cpu`; ImportError or NotImplementedError where there is none."""

    def pack(weight: Tensor, bias: Tensor | None) -> Product:
        from trivium_kernels import cpu

        kind = cpu.WeightType[weight_type]
        if not cpu.can_pack(kind):
            raise NotImplementedError("this processor lacks the instructions")
        return cpu.PackedWeight(weight, bias, kind)

    return pack


def _is_exact_in(dtype: torch.dtype) -> Callable[[Tensor], bool]:
    return lambda weight: torch.equal(weight.to(dtype).to(weight.dtype), weight)


def fits_half(weight: Tensor) -> bool:
    """Whether float16 can hold every number of `weight`; the smallest lose digits."""
    low, high = torch.aminmax(weight)
    return bool(max(-low, high) < _MAX_HALF)


PLAIN = Packing("linear", _pack_plain, 4, 1e-6)
ONEDNN = Packing("onednn", _pack_onednn, 4, 1e-5)
HALF = Packing("fp16", _pack_half, 2, 2e-3, fits_half)
INT8 = Packing("int8", _pack_int8, 1, 4e-2)
NATIVE = Packing("native float32", _pack_native("FLOAT32"), 4, 1e-5)
NATIVE_BF16 = Packing("native bfloat16", _pack_native("BFLOAT16"), 2, 2e-2, _is_exact_in(torch.bfloat16))
NATIVE_FP16 = Packing("native float16", _pack_native("FLOAT16"), 2, 2e-3, _is_exact_in(torch.float16))
NATIVE_BF16_PRODUCTS = Packing("native products of bfloat16", _pack_native("BFLOAT16_PAIRS"), 2, 2e-2)
NATIVE_INT8 = Packing("native int8", _pack_native("INT8"), 1, 4e-2)


def why_unavailable(packing: Packing) -> str | None:
    """None if the operator works here: it exists, and computes what `linear` computes."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn((5, 48), generator=generator), torch.randn((32, 48), generator=generator)
    bias = torch.randn(32, generator=generator)
    expected = F.linear(x, weight, bias)
    try:
        found = packing.pack(weight, bias)(x)
    except (AttributeError, ImportError, RuntimeError) as error:
        return str(error).partition("\n")[0][:120]
    deviation = float((found - expected).abs().max() / expected.abs().max())
    return None if deviation <= packing.tolerance else f"its results are wrong by {deviation:.1e}"
