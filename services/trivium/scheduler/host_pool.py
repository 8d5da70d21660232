"""Host memory for the KV of preempted requests: which host block holds what for whom. Pure; moves nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SwappedKV:
    """Self-attention KV of the first `num_tokens` tokens of a request, in `host_block_ids` in order."""

    num_tokens: int
    host_block_ids: tuple[int, ...]


class HostPool:
    """Hands out host block ids [0, num_blocks), each to one request. Owner: KVCacheManager.

    A swap-out is pending until a plan carries it (`take_pending`); one that is dropped before is never carried. A host
    block given back by `take` may be written by the next plan, not by the one that reads it: in a plan the swaps out
    come first. `take` follows every `put` of the same plan, so this holds by itself.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._swapped: dict[int, SwappedKV] = {}  # request key -> what it has here
        self._pending: dict[int, int] = {}  # host block id -> block id

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_requests(self) -> int:
        """Requests that have something here."""
        return len(self._swapped)

    def holds(self, key: int) -> bool:
        return key in self._swapped

    def put(self, key: int, block_ids: Sequence[int], num_tokens: int) -> bool:
        """Save the KV of `num_tokens` tokens in `block_ids` with the next plan; False if there is no room for it."""
        assert key not in self._swapped, f"request {key} is swapped out twice"
        if not num_tokens or len(block_ids) > len(self._free):
            return False
        host_block_ids = tuple(self._free.pop() for _ in block_ids)
        self._swapped[key] = SwappedKV(num_tokens, host_block_ids)
        self._pending.update(zip(host_block_ids, block_ids, strict=True))
        return True

    def find(self, key: int) -> SwappedKV:
        """What request `key` has here, maybe nothing."""
        return self._swapped.get(key, _NOTHING)

    def take(self, key: int) -> None:
        """The plan in the making copies back what it wants of request `key`: its host blocks are free after it."""
        self._free.extend(self._swapped.pop(key, _NOTHING).host_block_ids)

    def drop(self, key: int) -> None:
        """Nobody will read what request `key` has here."""
        for host_block_id in self.find(key).host_block_ids:
            self._pending.pop(host_block_id, None)
        self.take(key)

    def drop_all(self) -> None:
        """The host memory is lost."""
        for key in list(self._swapped):
            self.drop(key)

    def take_pending(self) -> tuple[tuple[int, int], ...]:
        """Pairs (block, host block) that the plan being issued must copy."""
        pairs = tuple((block_id, host_block_id) for host_block_id, block_id in self._pending.items())
        self._pending.clear()
        return pairs

    def check_invariants(self) -> None:
        held = [block_id for swapped in self._swapped.values() for block_id in swapped.host_block_ids]
        assert sorted([*self._free, *held]) == list(range(self.num_blocks)), "host blocks lost or shared"
        assert self._pending.keys() <= set(held), "a swap-out is pending for a free host block"


_NOTHING = SwappedKV(0, ())
