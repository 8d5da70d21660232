"""Layers of Llama 8B in int4, groups of 128, against the same layer in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gpu_kernels.case import HALF, Case, Inputs, num_bytes
from trivium_kernels.dispatch import Kernels
from trivium_kernels.int4_linear import BLOCK, SLICE, SLICES, Int4Weight
from trivium_kernels.reference.int4_linear import dequantized


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    for shape in ((28672, 4096), (4096, 14336), (6144, 4096)) if full else ((72, 256),):
        yield _case(kernels, inputs, shape, 1, ordered=True)
        for num_rows in (1, 16, 64, 256) if full else (1, 65):
            yield _case(kernels, inputs, shape, num_rows, ordered=False)


def _case(kernels: Kernels, inputs: Inputs, shape: tuple[int, int], num_rows: int, *, ordered: bool) -> Case:
    out_features, in_features = shape
    weight, x = _weight(inputs, out_features, in_features, ordered=ordered), inputs.normal(num_rows, in_features)
    dense = inputs.normal(out_features, in_features)
    return Case(
        f"{num_rows} x {in_features} -> {out_features}{', ordered' if ordered else ''}",
        lambda: kernels.int4_linear(x, weight),
        lambda: F.linear(x.double(), dequantized(weight).double()),
        num_bytes(x, weight.words, weight.scales, weight.zeros) + num_rows * out_features * HALF.itemsize,
        lambda: F.linear(x, dense),
        num_flops=2 * num_rows * in_features * out_features,
        tolerance=2**-6,  # the weights are rounded to bfloat16, too
    )


def _weight(inputs: Inputs, out_features: int, in_features: int, *, ordered: bool) -> Int4Weight:
    num_groups = in_features // BLOCK
    return Int4Weight(
        words=inputs.below(2**31 - 1, num_groups * SLICE, out_features, dtype=torch.int32),
        slice_groups=torch.arange(num_groups, device=inputs.device).repeat_interleave(SLICES).int(),
        scales=inputs.normal(num_groups, out_features).abs() / 100,
        zeros=inputs.below(16, num_groups, out_features).to(torch.int8),
        inputs=inputs.different(in_features, in_features).int() if ordered else None,
        in_features=in_features,
    )
