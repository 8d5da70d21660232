"""Layers of Llama 8B in int8 and float8, against the same layer in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gpu_kernels.case import HALF, Case, Inputs, num_bytes
from trivium_kernels.byte_linear import SCALE_BLOCK, ByteWeight
from trivium_kernels.dispatch import Kernels
from trivium_kernels.reference.byte_linear import dequantized


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        for shape in ((28672, 4096), (4096, 14336)) if full else ((72, 300),):
            for num_rows in (1, 64, 256) if full else (1, 65):
                yield _case(kernels, inputs, dtype, shape, num_rows, has_blocks=False)
                if dtype.is_floating_point:
                    yield _case(kernels, inputs, dtype, shape, num_rows, has_blocks=True)


def _case(
    kernels: Kernels, inputs: Inputs, dtype: torch.dtype, shape: tuple[int, int], num_rows: int, *, has_blocks: bool
) -> Case:
    out_features, in_features = shape
    values = (30 * inputs.normal(out_features, in_features, dtype=torch.float32)).clamp(-120, 120).to(dtype)
    num_scales = (-(-in_features // SCALE_BLOCK), out_features) if has_blocks else (out_features,)
    weight = ByteWeight(values, inputs.normal(*num_scales, dtype=torch.float32).abs())
    x, dense = inputs.normal(num_rows, in_features), inputs.normal(out_features, in_features)
    kind = str(dtype).removeprefix("torch.") + (", scales of blocks" if has_blocks else "")
    return Case(
        f"{kind}, {num_rows} x {in_features} -> {out_features}",
        lambda: kernels.byte_linear(x, weight),
        lambda: F.linear(x.double(), dequantized(weight).double()),
        num_bytes(x, values, weight.scales) + num_rows * out_features * HALF.itemsize,
        lambda: F.linear(x, dense),
        num_flops=2 * num_rows * in_features * out_features,
        tolerance=2**-6,
    )
