"""What the executor holds, for its ledger. Called in the event loop while the model's thread runs: it only reads."""

from __future__ import annotations

from trivium.executor.model_runner import ModelRunner
from trivium.v1.ledger_pb2 import ExecutorLedger


def executor_ledger(runner: ModelRunner, *, steps_done: int) -> ExecutorLedger:
    """The numbers of `runner` now; in the middle of a step, some of its freed and new rows may be counted already."""
    return ExecutorLedger(
        occupied_slots=runner.num_occupied_slots,
        steps_done=steps_done,
        kv_pool_bytes=runner.kv_pool_bytes,
    )
