"""Block tables: which blocks hold the keys and values of which request."""

from __future__ import annotations

from trivium.scheduler.block_pool import BlockPool
from trivium.scheduler.request import Request


class KVCacheManager:
    """Owner: the Scheduler. One pool serves self-attention and cross-attention tables.

    A running request holds ceil(tokens / block_size) self-attention blocks for the tokens computed or planned so far,
    and, with an encoder input, ceil(encoder tokens / block_size) cross-attention blocks.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._tables: dict[int, list[int]] = {}  # request key -> self-attention blocks
        self._cross_tables: dict[int, tuple[int, ...]] = {}  # request key -> cross-attention blocks

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_ever_fit(self, request: Request) -> bool:
        """Whether an empty pool could hold `request` at its full length."""
        return self.max_blocks_of(request) <= self.num_blocks

    def max_blocks_of(self, request: Request) -> int:
        """Blocks of `request` at its full length. The last output token is never computed, so it needs no room."""
        self_tokens = len(request.prompt_token_ids) + request.max_tokens - 1
        return self.num_blocks_for(self_tokens) + self.num_blocks_for(len(request.encoder_token_ids))

    def allocate_slots(self, request: Request, num_new_tokens: int) -> tuple[int, ...] | None:
        """Blocks for `num_new_tokens` more tokens of a request that has its first blocks already.

        The new block ids (maybe none), or None if the pool has too few; then nothing changes.
        """
        table = self._tables[request.key]
        missing = self.num_blocks_for(request.num_computed_tokens + num_new_tokens) - len(table)
        if missing <= 0:
            return ()
        new = self._pool.allocate(missing)
        if new is not None:
            table.extend(new)
        return new

    def allocate_first(self, request: Request, num_new_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(self-attention blocks, cross-attention blocks) for a request that enters the batch, or None: not now."""
        num_self = self.num_blocks_for(num_new_tokens)
        num_cross = self.num_blocks_for(len(request.encoder_token_ids))
        blocks = self._pool.allocate(num_self + num_cross)
        if blocks is None:
            return None
        table, cross = blocks[:num_self], blocks[num_self:]
        self._tables[request.key] = list(table)
        if cross:
            self._cross_tables[request.key] = cross
        return table, cross

    def free(self, request: Request) -> None:
        """Give back every block of `request`, which must hold some. Last blocks first, so that they are reused last."""
        self._pool.free(reversed(self._tables.pop(request.key)))
        self._pool.free(self._cross_tables.pop(request.key, ()))

    def check_invariants(self) -> None:
        self._pool.check_invariants([*self._tables.values(), *self._cross_tables.values()])
        assert self._cross_tables.keys() <= self._tables.keys(), "cross-attention table without a request"
