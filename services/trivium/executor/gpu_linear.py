"""Linear layers on a GPU: cuBLAS by way of torch, and the ops that multiply weights of 8 and 4 bits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.executor.linear import Linear, Product
from trivium_kernels.byte_linear import ByteLinear, ByteWeight
from trivium_kernels.int4_linear import Int4Linear, Int4Weight

logger = logging.getLogger(__name__)

_LARGEST = 127


@dataclass(frozen=True, slots=True)
class ByteProduct:
    """A Product with weights of one byte."""

    multiply: ByteLinear
    weight: ByteWeight
    bias: Tensor | None

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = self.multiply(x, self.weight, self.bias)
        return y if add is None else y.add_(add)


@dataclass(frozen=True, slots=True)
class Int4Product:
    """A Product with weights of 4 bits."""

    multiply: Int4Linear
    weight: Int4Weight
    bias: Tensor | None

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = self.multiply(x, self.weight, self.bias)
        return y if add is None else y.add_(add)


@dataclass(frozen=True, slots=True)
class FloatProduct:
    """A Product with weights of the type of `x`."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if add is None else y.add_(add)


@dataclass(frozen=True, slots=True)
class StackedProduct:
    """A Product whose outputs are those of `parts`, in their order: stored layers that no single op can multiply."""

    parts: tuple[Product, ...]

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = torch.cat([part(x) for part in self.parts], dim=1)
        return y if add is None else y.add_(add)


def quantize(linears: Sequence[Linear], multiply: ByteLinear) -> int:
    """Exchange the weights of `linears` for int8 ones with a scale per output. Returns the bytes that they take."""
    num_bytes = 0
    for linear in linears:
        weight = int8_weight(linear.dense_weight())
        linear.use(ByteProduct(multiply, weight, linear.bias))
        num_bytes += weight.values.nbytes + weight.scales.nbytes
    logger.info("linear layers: %d in int8, %.1f MiB", len(linears), num_bytes / 2**20)
    return num_bytes


def int8_weight(weight: Tensor) -> ByteWeight:
    """[out_features, in_features] rounded to 127 steps of its row's largest number."""
    scales = weight.abs().amax(dim=1).float().clamp_(min=1e-12) / _LARGEST
    values = (weight.float() / scales[:, None]).round_().to(torch.int8)
    return ByteWeight(values, scales)
