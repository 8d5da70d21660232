"""`move_blocks` in plain torch, beam by beam."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium_kernels.move_blocks import BlockCopies


def move_blocks(
    block_tables: Tensor, slots: Tensor, parents: Tensor, num_tokens: Tensor, *, block_size: int
) -> BlockCopies:
    copies = torch.full((2, *slots.shape), -1, dtype=torch.int64, device=block_tables.device)
    for group, count in enumerate(num_tokens.tolist()):
        own_slots = slots[group][slots[group] >= 0]
        before = block_tables[own_slots]
        own_parents = parents[group, : len(own_slots)].tolist()
        num_full = count // block_size
        block_tables[own_slots, :num_full] = before[own_parents, :num_full]
        if count % block_size:
            childless = iter([beam for beam in range(len(own_slots)) if beam not in own_parents])
            for beam, parent in enumerate(own_parents):
                giver = parent
                if parent in own_parents[:beam]:
                    giver = next(childless)
                    copies[:, group, beam] = before[[parent, giver], num_full]
                block_tables[own_slots[beam], num_full] = before[giver, num_full]
    return BlockCopies(*copies.flatten(1))
