"""CPU time that the grammars of rows take, and which rows have used too much of it.

Ordinary grammars take 0.01 to 1 ms a step; an ambiguous one may take more and more with each token, and everybody in
the batch waits for it. The CPU time of a thread is asked of the system, in about 0.6 us, where a mask and a token often
take ten: so rows are timed one by one only while all of them take longer than one may, or one has debts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

_STEP_S = 0.005
_MAX_DEBT_S = 1.0


class GrammarTimes:
    """Debts of rows: CPU time beyond _STEP_S a step. Owner: GrammarRows.

    A step is `compute_masks`, then `consume`. The first slow step beside others is not charged to anyone.
    """

    def __init__(self) -> None:
        self._debts_s: dict[int, float] = {}  # slot -> CPU time, above 0
        self._consumed_s = 0.0  # since the last masks
        self._is_each_timed = False

    def compute_masks(self, slots: Sequence[int], compute: Callable[[int, int], None]) -> None:
        """`compute(index, slot)` for each of `slots`, less what a step allows."""
        seconds = self._run(slots, compute, _STEP_S) + self._consumed_s
        self._consumed_s = 0.0
        self._is_each_timed = seconds > _STEP_S or bool(self._debts_s)

    def consume(self, slots: Sequence[int], consume: Callable[[int, int], None]) -> None:
        """`consume(index, slot)` for each of `slots`."""
        self._consumed_s += self._run(slots, consume, 0.0)

    def forget(self, slot: int) -> None:
        self._debts_s.pop(slot, None)

    def take_slow(self, slots: Sequence[int]) -> list[int]:
        """Those of `slots` that have used too much time; they begin anew."""
        slow = [slot for slot in slots if self._debts_s.get(slot, 0.0) > _MAX_DEBT_S]
        for slot in slow:
            self.forget(slot)
        return slow

    def _run(self, slots: Sequence[int], work: Callable[[int, int], None], allowed_s: float) -> float:
        """Seconds of all together."""
        is_each_timed = self._is_each_timed or len(slots) == 1
        began_s = now_s = time.thread_time()
        for index, slot in enumerate(slots):
            work(index, slot)
            if is_each_timed:
                last_s, now_s = now_s, time.thread_time()
                self._charge(slot, now_s - last_s - allowed_s)
        return (now_s if is_each_timed else time.thread_time()) - began_s

    def _charge(self, slot: int, seconds: float) -> None:
        debt_s = self._debts_s.get(slot, 0.0) + seconds
        if debt_s > 0.0:
            self._debts_s[slot] = debt_s
        else:
            self.forget(slot)
