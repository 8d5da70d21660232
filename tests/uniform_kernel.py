"""The random numbers of the Triton sampler by themselves. Imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.draw import uniform_number


def uniforms(seed: Tensor, choice_index: Tensor, position: Tensor) -> Tensor:
    found = torch.empty(len(seed), dtype=torch.float64)
    _uniforms_kernel[(1,)](seed, choice_index, position, found, len(seed), TILE=512)
    return found


@triton.jit
def _uniforms_kernel(seed_ptr, choice_index_ptr, position_ptr, found_ptr, num_rows, TILE: tl.constexpr) -> None:
    rows = tl.arange(0, TILE)
    mask = rows < num_rows
    seed = tl.load(seed_ptr + rows, mask=mask, other=0)
    choice_index = tl.load(choice_index_ptr + rows, mask=mask, other=0)
    position = tl.load(position_ptr + rows, mask=mask, other=0)
    tl.store(found_ptr + rows, uniform_number(seed, choice_index, position), mask=mask)
