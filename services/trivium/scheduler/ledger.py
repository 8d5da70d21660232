"""What the scheduler holds, for its ledger."""

from __future__ import annotations

from trivium.scheduler.scheduler import Scheduler
from trivium.v1.ledger_pb2 import SchedulerLedger


def scheduler_ledger(scheduler: Scheduler, *, sessions: int = 0) -> SchedulerLedger:
    """The numbers of `scheduler` now, with `sessions` clients. O(blocks held for cross-attention)."""
    kv_cache = scheduler.kv_cache
    return SchedulerLedger(
        running_requests=scheduler.num_running,
        waiting_requests=scheduler.num_waiting,
        waiting_tokens=scheduler.num_waiting_tokens,
        blocks_total=kv_cache.num_blocks,
        blocks_free=kv_cache.num_free_blocks,
        blocks_held=scheduler.num_held_blocks,
        blocks_cached=kv_cache.num_cached_blocks,
        blocks_cross=kv_cache.num_cross_blocks,
        preemptions=scheduler.num_preemptions,
        prefix_tokens_queried=kv_cache.num_prompt_tokens_queried,
        prefix_tokens_hit=kv_cache.num_prompt_tokens_hit,
        sessions=sessions,
        host_blocks_total=kv_cache.host.num_blocks,
        host_blocks_free=kv_cache.host.num_free_blocks,
        swapped_requests=kv_cache.host.num_requests,
        swaps=scheduler.num_swaps,
    )
