"""The pool of KV blocks: which are free, and how many tables hold each of the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class KVCacheBlock:
    """Owner: BlockPool. `ref_count` is the number of block tables that hold the block; 0 means free."""

    block_id: int
    ref_count: int = 0


class BlockPool:
    """Hands out block ids [0, num_blocks). Owner: KVCacheManager.

    A freed block may be handed out again at once: plans run in order, so a plan that still writes to it runs before
    any plan that grants it anew.
    """

    def __init__(self, num_blocks: int) -> None:
        self._blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """`count` blocks with one holder each, or None if there are not so many; then nothing changes."""
        if count > len(self._free):
            return None
        ids = tuple(self._free.popleft() for _ in range(count))
        for block_id in ids:
            self._blocks[block_id].ref_count = 1
        return ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Give up one hold on each block."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            assert block.ref_count > 0, f"block {block_id} freed twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free.append(block_id)

    def check_invariants(self, tables: Sequence[Sequence[int]]) -> None:
        """Recompute every count from `tables`, which are all block tables that exist."""
        held: dict[int, int] = {}
        for table in tables:
            for block_id in table:
                held[block_id] = held.get(block_id, 0) + 1
        for block in self._blocks:
            assert block.ref_count == held.get(block.block_id, 0), f"block {block.block_id}: wrong ref_count"
        assert len(self._free) == len(set(self._free)), "a block is free twice"
        assert set(self._free) == {block.block_id for block in self._blocks if block.ref_count == 0}, "free list wrong"
