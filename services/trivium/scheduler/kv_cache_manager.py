"""Block tables: which blocks hold the keys and values of which request, and which of them it need not compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trivium.beam_search import move_blocks
from trivium.scheduler.block_hash import cross_hashes
from trivium.scheduler.block_pool import BlockHash, BlockPool
from trivium.scheduler.host_pool import HostPool
from trivium.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a request gets on entering the batch. The first `num_cached_tokens` tokens need not be computed.

    `needs_encoder` says that its cross-attention blocks are new, and must be filled by an encoder run. copied_blocks,
    swapped_in: as in `SchedulerOutput`; the plan that adds the request carries them. beam_block_ids: of beam search,
    when the whole prompt is computed at once: the tables of all beams but the first.
    """

    block_ids: tuple[int, ...]
    cross_block_ids: tuple[int, ...]
    num_cached_tokens: int
    num_new_tokens: int
    needs_encoder: bool
    copied_blocks: tuple[tuple[int, int], ...] = ()
    swapped_in: tuple[tuple[int, int], ...] = ()
    beam_block_ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class _HeadStart:
    """What a request that enters the batch need not compute: its first `num_tokens` tokens.

    shared, cross: blocks that it holds together with others. The contents of its next blocks come from the blocks
    `copied`, or from the host blocks `host_block_ids`.
    """

    num_tokens: int
    shared: tuple[int, ...]
    cross: tuple[int, ...]
    copied: tuple[int, ...] = ()
    host_block_ids: tuple[int, ...] = ()


class KVCacheManager:
    """Owner: the Scheduler. One pool serves self-attention and cross-attention tables.

    A running request holds ceil(tokens / block_size) self-attention blocks for the tokens computed or planned so far,
    and, with an encoder input, ceil(encoder tokens / block_size) cross-attention blocks. With beam search each beam has
    a table, from the step on that completes the prompt; full blocks are in the tables of all beams that share them.

    Full self-attention blocks of a prompt (`cache_full_blocks`), and cross-attention blocks, are findable as soon as it
    is certain that a plan fills them: whoever finds them reads them in that plan, after they are written, or in a later
    one. Blocks with output become findable when the step that filled them is acknowledged: a row may end on the
    executor before, and then they are not filled.

    A request that loses its blocks may leave their contents in the host pool (`swap_out`) until it enters again.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, num_host_blocks: int = 0, enable_prefix_caching: bool = True
    ) -> None:
        self.block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self.host = HostPool(num_host_blocks)
        self._pool = BlockPool(num_blocks)
        self._tables: dict[int, list[int]] = {}  # request key -> self-attention blocks
        self._beam_tables: dict[int, list[list[int]]] = {}  # request key -> tables of the other beams
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
    def num_evictions(self) -> int:
        """Findable blocks whose contents were lost to somebody else, so far."""
        return self._pool.num_evictions

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
        num_self = self.num_blocks_for(len(request.prompt_token_ids) + request.max_tokens - 1)
        num_shared = len(request.prompt_token_ids) // self.block_size
        num_beams = 1 if request.beams is None else request.beams.width
        num_cross = self.num_blocks_for(len(request.encoder_token_ids))
        return num_shared + num_beams * (num_self - num_shared) + num_cross

    def allocate_slots(self, request: Request, num_tokens: int) -> tuple[int, ...] | None:
        """Blocks until the table of a running request has room for `num_tokens` tokens.

        The new block ids (maybe none), or None if the pool has too few; then nothing changes.
        """
        table = self._tables[request.key]
        missing = self.num_blocks_for(num_tokens) - len(table)
        if missing <= 0:
            return ()
        new = self._pool.allocate(missing)
        if new is not None:
            table.extend(new)
        return new

    def allocate_first(self, request: Request, max_new_tokens: int) -> Allocation | None:
        """Blocks for a request that enters the batch and computes at most `max_new_tokens`, or None: not now."""
        start = self._find_start(request)
        cross = start.cross
        num_new_tokens = min(request.num_tokens - start.num_tokens, max_new_tokens)
        num_new_blocks = self.num_blocks_for(start.num_tokens + num_new_tokens) - len(start.shared)
        num_cross = 0 if cross else self.num_blocks_for(len(request.encoder_token_ids))
        num_join = self._num_join_blocks(request, start.num_tokens + num_new_tokens)
        num_needed = num_new_blocks + num_cross + num_join
        shared = (*start.shared, *cross)
        num_revived = sum(self._pool.is_free(block_id) for block_id in shared)
        if num_needed + num_revived > self._pool.num_free_blocks:
            return None
        self._pool.share(shared)
        new = self._pool.allocate(num_needed)
        assert new is not None, "the pool has fewer free blocks than it said"
        table, new_cross = [*start.shared, *new[:num_new_blocks]], new[num_new_blocks : num_new_blocks + num_cross]
        self._tables[request.key] = table
        request.num_named_blocks = len(start.shared)
        if cross or new_cross:
            self._cross_tables[request.key] = cross or new_cross
        self._name_cross(request, new_cross)
        self.host.take(request.key)
        self.num_prompt_tokens_queried += request.num_tokens
        self.num_prompt_tokens_hit += len(start.shared) * self.block_size
        return Allocation(
            tuple(table),
            cross or new_cross,
            start.num_tokens,
            num_new_tokens,
            bool(new_cross),
            copied_blocks=tuple(zip(start.copied, new, strict=False)),
            swapped_in=tuple(zip(new, start.host_block_ids, strict=False)),
            beam_block_ids=self._join_beams(
                request, start.num_tokens + num_new_tokens, new[num_new_blocks + num_cross :]
            ),
        )

    def allocate_beams(self, request: Request, num_tokens: int) -> tuple[tuple[int, ...], ...] | None:
        """As `allocate_slots`, for the beams of a group: new block ids of each beam, the first one first.

        While the prompt is computed only the first beam has blocks; with its last token the others join.
        """
        has_joined, others = request.key in self._beam_tables, self._beam_tables.get(request.key, ())
        missing = max(0, self.num_blocks_for(num_tokens) - len(self._tables[request.key]))
        num_grown = missing * (1 + len(others))
        new = self._pool.allocate(num_grown + (0 if has_joined else self._num_join_blocks(request, num_tokens)))
        if new is None:
            return None
        grown = tuple(new[start : start + missing] for start in range(0, num_grown, missing)) if missing else ()
        for table, blocks in zip((self._tables[request.key], *others), grown, strict=False):
            table.extend(blocks)
        if has_joined:
            return grown
        return (grown[0] if grown else (), *self._join_beams(request, num_tokens, new[num_grown:]))

    def move_beams(self, request: Request, parents: Sequence[int], num_tokens: int) -> None:
        """Beam i of a group goes on from beam parents[i], with `num_tokens` tokens computed: as `move_blocks` says."""
        tables = [self._tables[request.key], *self._beam_tables[request.key]]
        moved, _ = move_blocks(tables, parents, num_tokens, self.block_size)
        changed = [
            (old_id, new_id)
            for old, new in zip(tables, moved, strict=True)
            for old_id, new_id in zip(old, new, strict=True)
            if old_id != new_id
        ]
        self._pool.share(new_id for _, new_id in changed)
        self._pool.free(old_id for old_id, _ in changed)
        self._tables[request.key], *self._beam_tables[request.key] = moved

    def cache_full_blocks(self, request: Request, num_tokens: int) -> None:
        """The first `num_tokens` tokens of a running request are in its blocks, or will be before anybody reads them.

        Make the full blocks findable.
        """
        num_full = num_tokens // self.block_size
        if not self._enable_prefix_caching or num_full <= request.num_named_blocks:
            return
        hashes = request.block_hashes.up_to(
            num_full, self.block_size, request.prompt_token_ids, request.output_token_ids
        )
        table = self._tables[request.key]
        for index in range(request.num_named_blocks, num_full):
            self._pool.name(table[index], hashes[index])
        request.num_named_blocks = num_full

    def swap_out(self, request: Request, num_computed_tokens: int) -> bool:
        """Keep in host memory what a running request has computed; `free` must follow. False if there is no room.

        Tokens in flight are void once it is freed, and the last known one must be computed again for its sample.
        A beam search starts over, so there is nothing to keep.
        """
        if request.beams is not None:
            return False
        num_tokens = min(num_computed_tokens, request.num_tokens - 1)
        return self.host.put(request.key, self._tables[request.key][: self.num_blocks_for(num_tokens)], num_tokens)

    def free(self, request: Request) -> None:
        """Give back every block of `request`, which must hold some. Of its findable blocks the last are lost first."""
        self._pool.free(reversed(self._tables.pop(request.key)))
        for table in self._beam_tables.pop(request.key, ()):
            self._pool.free(reversed(table))
        self._pool.free(reversed(self._cross_tables.pop(request.key, ())))
        request.num_named_blocks = 0

    def forget_contents(self) -> None:
        """What the blocks contained is lost, host memory included; who holds them stays."""
        self._pool.forget_all()
        self.host.drop_all()

    def check_invariants(self) -> None:
        beams = [table for tables in self._beam_tables.values() for table in tables]
        self._pool.check_invariants([*self._tables.values(), *beams, *self._cross_tables.values()])
        assert self._beam_tables.keys() <= self._tables.keys(), "beams without a request"
        self.host.check_invariants()
        assert self._cross_tables.keys() <= self._tables.keys(), "cross-attention table without a request"

    def _num_join_blocks(self, request: Request, num_tokens: int) -> int:
        """Blocks that the other beams need of their own when `num_tokens` tokens are the whole prompt."""
        if request.beams is None or num_tokens < request.num_prompt_tokens or num_tokens % self.block_size == 0:
            return 0
        return request.beams.width - 1

    def _join_beams(self, request: Request, num_tokens: int, block_ids: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Give the other beams their tables if the prompt is complete: its full blocks, and one of `block_ids` each."""
        if request.beams is None or num_tokens < request.num_prompt_tokens:
            return ()
        full = self._tables[request.key][: num_tokens // self.block_size]
        num_others = request.beams.width - 1
        tables = [[*full, *block_ids[beam : beam + 1]] for beam in range(num_others)]
        for _ in range(num_others):
            self._pool.share(full)
        self._beam_tables[request.key] = tables
        return tuple(tuple(table) for table in tables)

    def _find_start(self, request: Request) -> _HeadStart:
        if request.fork_point is not None and request.fork_point.still_runs:
            return self._fork(request, request.fork_point.leader)
        cached, swapped = self._find_prefix(request), self.host.find(request.key)
        return _HeadStart(
            max(len(cached) * self.block_size, swapped.num_tokens),
            cached,
            self._find_cross(request),
            host_block_ids=swapped.host_block_ids[len(cached) :],
        )

    def _fork(self, request: Request, leader: Request) -> _HeadStart:
        """The prompt of `leader`: its full blocks to share, and the one that both go on writing to as a copy."""
        num_tokens = min(request.num_prompt_tokens, request.num_tokens - 1)
        num_full, table = num_tokens // self.block_size, self._tables[leader.key]
        return _HeadStart(
            num_tokens,
            tuple(table[:num_full]),
            self._cross_tables.get(leader.key, ()),
            copied=tuple(table[num_full : self.num_blocks_for(num_tokens)]),
        )

    def _find_prefix(self, request: Request) -> tuple[int, ...]:
        """Blocks with the beginning of the sequence, as far as it need not be computed."""
        if not self._enable_prefix_caching:
            return ()
        num_full = request.num_skippable_tokens // self.block_size
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
