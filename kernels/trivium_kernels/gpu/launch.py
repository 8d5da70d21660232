"""What launchers have in common: tile sizes, types of matrix products, rows of strided tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_ROW_TILE = 1024  # elements: short rows share a program until they fill this


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size` >= 1: tiles have no other sizes."""
    return 1 << (size - 1).bit_length()


def dot_type(x: Tensor) -> Any:
    """The type in which tiles of `x` are multiplied: its own.

    Triton's interpreter keeps bfloat16 as bare bits and would multiply those, so there it is float32.
    """
    if x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return _TRITON_TYPES[x.dtype]


@dataclass(frozen=True, slots=True)
class RowTile:
    """A program has `rows` rows of `width` elements in registers. It depends on the width of a row alone."""

    width: int
    rows: int
    num_warps: int


def row_tile(width: int) -> RowTile:
    tile = power_of_two(width)
    return RowTile(tile, max(1, _ROW_TILE // tile), min(16, max(4, tile // 512)))


@dataclass(frozen=True, slots=True)
class Rows:
    """Row r of `data` begins at element (r // per_outer) * outer_stride + (r % per_outer) * inner_stride."""

    data: Tensor
    per_outer: int
    outer_stride: int
    inner_stride: int


def as_rows(x: Tensor) -> Rows:
    """`x` [..., width] as rows; slices of a wider projection need no copy."""
    if x.stride(-1) != 1 or (x.dim() > 3 and not x.is_contiguous()):
        x = x.contiguous()
    if x.dim() == 3:
        return Rows(x, x.shape[1], x.stride(0), x.stride(1))
    return Rows(x, 1, x.stride(0) if x.dim() == 2 else x.shape[-1], 0)
