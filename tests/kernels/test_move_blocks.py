"""move_blocks against the engine's own rule."""

from __future__ import annotations

import random

import torch

from trivium import beam_search
from trivium_kernels.dispatch import Kernels


def test_the_tables_of_random_groups(kernels: Kernels) -> None:
    numbers = random.Random(0)
    block_size, max_blocks, max_width = 4, 40, 5
    for _ in range(6):
        widths = [5, 1, 3]
        slots = numbers.sample(range(12), sum(widths))
        tables = torch.randperm(12 * max_blocks).view(12, max_blocks).int()
        num_tokens = [numbers.randrange(0, 4 * max_blocks) for _ in widths]
        parents = [[numbers.randrange(width) for _ in range(width)] for width in widths]
        own = [[slots.pop() for _ in range(width)] for width in widths]
        expected, copies = tables.clone(), []
        for group in range(3):
            moved, group_copies = beam_search.move_blocks(
                tables[own[group]].tolist(), parents[group], num_tokens[group], block_size
            )
            expected[own[group]] = torch.tensor(moved, dtype=torch.int32)
            copies += group_copies
        found = kernels.move_blocks(
            tables,
            torch.tensor([group + [-1] * (max_width - len(group)) for group in own]),
            torch.tensor([group + [0] * (max_width - len(group)) for group in parents]),
            torch.tensor(num_tokens),
            block_size=block_size,
        )
        assert torch.equal(tables, expected)
        pairs = list(zip(found.from_blocks.tolist(), found.to_blocks.tolist(), strict=True))
        assert [pair for pair in pairs if pair != (-1, -1)] == copies
        assert len(pairs) == 3 * max_width
