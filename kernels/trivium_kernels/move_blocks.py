"""Block tables of the beams of a group after a step: who goes on from whom shares its full blocks.

The last, partial block of a parent goes to the first of its children; the others get the partial blocks of beams that
nobody goes on from, of which there are just as many, and what the parent's block holds must be copied there. Blocks
behind those stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockCopies:
    """Block from_blocks[i] has to be copied to to_blocks[i]; both int64 [num_copies], negative where there is none.

    No block is in both.
    """

    from_blocks: Tensor
    to_blocks: Tensor


class MoveBlocks(Protocol):
    def __call__(
        self, block_tables: Tensor, slots: Tensor, parents: Tensor, num_tokens: Tensor, *, block_size: int
    ) -> BlockCopies:
        """Change `block_tables` [num_slots, max_blocks] int32 in place. Returns num_groups * max_width copies.

        slots: [num_groups, max_width] int64, those of each group's beams, negative in empty places, which come last.
        parents: [num_groups, max_width] int64, the beam of the group that each beam goes on from. num_tokens:
        [num_groups] int64, how many tokens of each beam are computed.
        """
        ...
