"""Block tables of 16 requests with 4 beams each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_kernels.case import Case, Inputs, after, num_bytes
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    num_groups, width, max_blocks = (16, 4, 256) if full else (2, 3, 40)
    num_slots = num_groups * width
    tables = inputs.different(num_slots * max_blocks, num_slots * max_blocks).view(num_slots, max_blocks).int()
    slots = torch.arange(num_slots, device=inputs.device).view(num_groups, width)
    parents = inputs.below(width, num_groups, width)
    num_tokens = inputs.below(16 * max_blocks - 1, num_groups)

    def expected() -> Tensor:
        wanted = tables.clone()
        reference.move_blocks(wanted, slots, parents, num_tokens, block_size=16)
        return wanted.double()

    yield Case(
        f"{num_groups} x {width} beams, {max_blocks} blocks",
        after(lambda: kernels.move_blocks(tables, slots, parents, num_tokens, block_size=16), tables),
        expected,
        2 * num_bytes(tables),
        tolerance=0.0,
    )
