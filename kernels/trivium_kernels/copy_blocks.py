"""Copies of whole blocks: within a pool, where a shared block is about to be written, and out of and into it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class CopyBlocks(Protocol):
    def __call__(self, source: Tensor, target: Tensor, from_blocks: Tensor, to_blocks: Tensor) -> None:
        """target[to_blocks[i]] = source[from_blocks[i]], for pools [num_blocks, ...] of contiguous blocks of one shape.

        from_blocks, to_blocks: [num_copies] int64; a pair with a negative number fills up a list of fixed size. No
        block is written twice, and within one pool none is both read and written.
        """
        ...
