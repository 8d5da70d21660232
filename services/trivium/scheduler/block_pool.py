"""The pool of KV blocks: which are free, who holds the others, and which still have contents worth finding again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NewType

BlockHash = NewType("BlockHash", bytes)  # names what a full block contains, and everything before it


@dataclass(slots=True)
class KVCacheBlock:
    """Owner: BlockPool. `ref_count` is the number of block tables that hold the block; 0 means free.

    A block with a `block_hash` can be found by it, also while it is free, until it is allocated for something else.
    """

    block_id: int
    ref_count: int = 0
    block_hash: BlockHash | None = None


class BlockPool:
    """Hands out block ids [0, num_blocks). Owner: KVCacheManager. Every operation is O(1) per block.

    A freed block may be handed out again at once: plans run in order, so a plan that still writes to it runs before
    any plan that grants it anew. Free blocks are taken from the front of a list: those without a hash are put in front,
    the others behind, so that what was used least recently is lost first.
    """

    def __init__(self, num_blocks: int) -> None:
        self._blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_hash: dict[BlockHash, int] = {}  # hash -> block id
        self.num_evictions = 0

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, with or without contents that can be found."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that can be found by their contents, held or free."""
        return len(self._by_hash)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """`count` blocks with one holder each, or None if there are not so many; then nothing changes."""
        if count > len(self._free):
            return None
        return tuple(self._take() for _ in range(count))

    def find(self, block_hash: BlockHash) -> int | None:
        """The block that holds what `block_hash` names, if there is one."""
        return self._by_hash.get(block_hash)

    def is_free(self, block_id: int) -> bool:
        return self._blocks[block_id].ref_count == 0

    def share(self, block_ids: Iterable[int]) -> None:
        """One more hold on each block; free ones leave the free list with their contents."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                del self._free[block_id]
            block.ref_count += 1

    def name(self, block_id: int, block_hash: BlockHash) -> None:
        """Make a held block findable. A hash that names another block already keeps that one."""
        block = self._blocks[block_id]
        assert block.ref_count > 0, f"block {block_id} is named while it is free"
        if block.block_hash is None and block_hash not in self._by_hash:
            block.block_hash = block_hash
            self._by_hash[block_hash] = block_id

    def free(self, block_ids: Iterable[int]) -> None:
        """Give up one hold on each block. Of those that become free, the first given is the first to be reused."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            assert block.ref_count > 0, f"block {block_id} freed twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.block_hash is None:
                    self._free.move_to_end(block_id, last=False)

    def forget_all(self) -> None:
        """No block can be found any more: their contents are lost."""
        for block_id in self._by_hash.values():
            self._blocks[block_id].block_hash = None
        self._by_hash.clear()

    def check_invariants(self, tables: Sequence[Sequence[int]]) -> None:
        """Recompute every count from `tables`, which are all block tables that exist."""
        held: dict[int, int] = {}
        for table in tables:
            assert len(table) == len(set(table)), "a table holds a block twice"
            for block_id in table:
                held[block_id] = held.get(block_id, 0) + 1
        for block in self._blocks:
            assert block.ref_count == held.get(block.block_id, 0), f"block {block.block_id}: wrong ref_count"
        assert set(self._free) == {block.block_id for block in self._blocks if block.ref_count == 0}, "free list wrong"
        named = {block.block_hash: block.block_id for block in self._blocks if block.block_hash is not None}
        assert named == self._by_hash, "the index of block contents is wrong"

    def _take(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        block = self._blocks[block_id]
        if block.block_hash is not None:
            del self._by_hash[block.block_hash]
            block.block_hash = None
            self.num_evictions += 1
        block.ref_count = 1
        return block_id
