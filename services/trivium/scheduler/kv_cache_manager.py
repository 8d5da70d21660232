"""Block tables: which blocks hold the keys and values of which request, and which of them it need not compute."""

from __future__ import annotations

from dataclasses import dataclass

from trivium.scheduler.block_hash import cross_hashes
from trivium.scheduler.block_pool import BlockHash, BlockPool
from trivium.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a request gets on entering the batch. The first `num_cached_tokens` tokens are computed already.

    `needs_encoder` says that its cross-attention blocks are new, and must be filled by an encoder run.
    """

    block_ids: tuple[int, ...]
    cross_block_ids: tuple[int, ...]
    num_cached_tokens: int
    num_new_tokens: int
    needs_encoder: bool


class KVCacheManager:
    """Owner: the Scheduler. One pool serves self-attention and cross-attention tables.

    A running request holds ceil(tokens / block_size) self-attention blocks for the tokens computed or planned so far,
    and, with an encoder input, ceil(encoder tokens / block_size) cross-attention blocks.

    Full self-attention blocks become findable (`cache_full_blocks`) when the step that filled them is acknowledged.
    Cross-attention blocks are findable at once, because a plan that shares them runs after the one that fills them.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self._pool = BlockPool(num_blocks)
        self._tables: dict[int, list[int]] = {}  # request key -> self-attention blocks
        self._cross_tables: dict[int, tuple[int, ...]] = {}  # request key -> cross-attention blocks
        self.num_prompt_tokens_queried = 0
        self.num_prompt_tokens_hit = 0

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        return self._pool.num_cached_blocks

    @property
    def num_cross_blocks(self) -> int:
        """Cross-attention blocks that running requests hold, each counted once."""
        return len({block_id for table in self._cross_tables.values() for block_id in table})

    def num_slots_of(self, request: Request) -> int:
        """Tokens that the self-attention blocks of a running request have room for."""
        return len(self._tables[request.key]) * self.block_size

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
        missing = self.num_blocks_for(request.num_computed_tokens + num_new_tokens - request.num_slots)
        if missing <= 0:
            return ()
        new = self._pool.allocate(missing)
        if new is not None:
            self._tables[request.key].extend(new)
            request.num_slots += missing * self.block_size
        return new

    def allocate_first(self, request: Request, max_new_tokens: int) -> Allocation | None:
        """Blocks for a request that enters the batch and computes at most `max_new_tokens`, or None: not now."""
        cached = self._find_prefix(request)
        cross = self._find_cross(request)
        num_cached_tokens = len(cached) * self.block_size
        num_new_tokens = min(request.num_tokens - num_cached_tokens, max_new_tokens)
        num_new_blocks = self.num_blocks_for(num_cached_tokens + num_new_tokens) - len(cached)
        num_cross = 0 if cross else self.num_blocks_for(len(request.encoder_token_ids))
        shared = (*cached, *cross)
        num_revived = sum(self._pool.is_free(block_id) for block_id in shared)
        if num_new_blocks + num_cross + num_revived > self._pool.num_free_blocks:
            return None
        self._pool.share(shared)
        new = self._pool.allocate(num_new_blocks + num_cross)
        assert new is not None, "the pool has fewer free blocks than it said"
        table, new_cross = [*cached, *new[:num_new_blocks]], new[num_new_blocks:]
        self._tables[request.key] = table
        request.num_slots = len(table) * self.block_size
        if cross or new_cross:
            self._cross_tables[request.key] = cross or new_cross
        self._name_cross(request, new_cross)
        self.num_prompt_tokens_queried += request.num_tokens
        self.num_prompt_tokens_hit += num_cached_tokens
        return Allocation(tuple(table), cross or new_cross, num_cached_tokens, num_new_tokens, bool(new_cross))

    def cache_full_blocks(self, request: Request, num_tokens: int) -> None:
        """The first `num_tokens` tokens of a running request are in its blocks: make the full ones findable."""
        if not self._enable_prefix_caching:
            return
        num_full = num_tokens // self.block_size
        hashes = request.block_hashes.up_to(
            num_full, self.block_size, request.prompt_token_ids, request.output_token_ids
        )
        table = self._tables[request.key]
        for index in range(request.num_named_blocks, num_full):
            self._pool.name(table[index], hashes[index])
        request.num_named_blocks = max(num_full, request.num_named_blocks)

    def free(self, request: Request) -> None:
        """Give back every block of `request`, which must hold some. Of its findable blocks the last are lost first."""
        self._pool.free(reversed(self._tables.pop(request.key)))
        self._pool.free(reversed(self._cross_tables.pop(request.key, ())))
        request.num_named_blocks = 0
        request.num_slots = 0

    def forget_contents(self) -> None:
        """What the blocks contained is lost; who holds them stays."""
        self._pool.forget_all()

    def check_invariants(self) -> None:
        self._pool.check_invariants([*self._tables.values(), *self._cross_tables.values()])
        assert self._cross_tables.keys() <= self._tables.keys(), "cross-attention table without a request"

    def _find_prefix(self, request: Request) -> tuple[int, ...]:
        """Blocks with the beginning of the sequence; never all of it, because the last token must be computed."""
        if not self._enable_prefix_caching:
            return ()
        num_full = (request.num_tokens - 1) // self.block_size
        found = []
        for block_hash in request.block_hashes.up_to(
            num_full, self.block_size, request.prompt_token_ids, request.output_token_ids
        ):
            block_id = self._pool.find(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return tuple(found)

    def _find_cross(self, request: Request) -> tuple[int, ...]:
        """The cross-attention blocks of the same encoder input, if all of them are there, else none."""
        if not self._enable_prefix_caching or not request.encoder_token_ids:
            return ()
        found = [self._pool.find(block_hash) for block_hash in self._cross_hashes(request)]
        return () if None in found else tuple(block_id for block_id in found if block_id is not None)

    def _name_cross(self, request: Request, block_ids: tuple[int, ...]) -> None:
        if self._enable_prefix_caching and block_ids:
            for block_id, block_hash in zip(block_ids, self._cross_hashes(request), strict=True):
                self._pool.name(block_id, block_hash)

    def _cross_hashes(self, request: Request) -> tuple[BlockHash, ...]:
        return cross_hashes(request.block_hashes.root, self.num_blocks_for(len(request.encoder_token_ids)))
