"""Products of few rows: their inputs are split among programs, so that all of the GPU reads weights.

How many parts there are follows from the shape of the weight alone, and they are added in their order, so a row comes
out the same whatever rows are beside it. With more than MAX_ROWS rows cuBLAS multiplies, which chooses its order by
their number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import ceil_div

MAX_ROWS = 64  # more rows are for a product that is limited by arithmetic
ROW_TILE = 16
OUT_TILE = 64
_PROGRAMS = 512  # for a tile of rows: about four for each processor of a large GPU
_MAX_PARTS = 32
_SUM_TILE = 512


def split(out_features: int, steps: int) -> tuple[int, int]:
    """(parts, steps of a part): how `steps` >= 1 steps over the inputs are cut. The last part may be shorter."""
    parts = max(1, min(steps, _PROGRAMS // ceil_div(out_features, OUT_TILE), _MAX_PARTS))
    steps_of_part = ceil_div(steps, parts)
    return ceil_div(steps, steps_of_part), steps_of_part


def new_parts(x: Tensor, parts: int, out_features: int) -> Tensor:
    """[parts, num_rows, out_features] float32."""
    return torch.empty((parts, len(x), out_features), dtype=torch.float32, device=x.device)


def add_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [num_rows, out_features] = the sum of `parts`, plus bias."""
    num_parts, num_rows, out_features = parts.shape
    _add_parts_kernel[(num_rows, ceil_div(out_features, _SUM_TILE))](
        parts, bias, y, num_rows, OUT_FEATURES=out_features, PARTS=num_parts, TILE=_SUM_TILE, num_warps=4
    )


@triton.jit(do_not_specialize=["num_rows"])
def _add_parts_kernel(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_rows: tl.tensor,
    OUT_FEATURES: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < OUT_FEATURES
    total = tl.zeros([TILE], tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_ptr + (part * num_rows + row) * OUT_FEATURES + columns, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * OUT_FEATURES + columns, total, mask=mask)
