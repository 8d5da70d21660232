"""Stopping Python code that does not come to an end, such as the loops of a chat template.

An exception is raised in the thread that runs it (`PyThreadState_SetAsyncExc`), between two of its byte codes. That
costs the code nothing as long as nobody stops it, and leaves a thread that can go on with other work. A single call
into C cannot be stopped so.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 0.001


class TimeLimitExceededError(Exception):
    """The work was stopped."""


class _Stop(BaseException):
    """Raised in the middle of the work, where nobody catches it."""


class TimeLimit:
    """Lets one piece of work use at most `max_cpu_s` of its thread's CPU time, so that a busy machine stops nothing.

    One thread calls `run`, once. Another one calls `check` now and then, and `stop` when nobody waits for it any more.
    """

    def __init__(self, max_cpu_s: float) -> None:
        self._max_cpu_s = max_cpu_s
        self._is_stopped = False
        self._is_sent = False  # the exception is on its way, and comes with one of the thread's next byte codes
        # Each is taken once: by the work, which begins and ends, or by whoever stops it before that.
        self._begin, self._end = threading.Lock(), threading.Lock()
        self._thread = 0
        self._clock: int | None = None  # counts the thread's CPU time; None where there is no such clock
        self._began_s = 0.0

    def run(self, work: Callable[[], T]) -> T:
        """The result of `work`. Raises TimeLimitExceededError if it was stopped, and what `work` raises."""
        self._thread = threading.get_ident()
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(self._thread)
        self._began_s = self._now_s()
        if not self._begin.acquire(blocking=False):
            raise TimeLimitExceededError
        try:
            try:
                return work()
            finally:
                self._finish()
        except _Stop:
            raise TimeLimitExceededError from None

    def check(self) -> float:
        """Stop the work if its time is up; else the seconds for which it cannot be."""
        if not self._begin.locked():
            return self._max_cpu_s
        left_s = self._began_s + self._max_cpu_s - self._now_s()
        if left_s <= 0:
            self.stop()
        return max(left_s, _POLL_S)

    def stop(self) -> None:
        """Stop the work, unless it has ended."""
        if self._is_stopped:
            return
        self._is_stopped = True
        if not self._begin.acquire(blocking=False) and self._end.acquire(blocking=False):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_Stop))
            self._is_sent = True

    def _finish(self) -> None:
        """The work is over. An exception that somebody sends comes here or not at all, but in nothing that follows.

        However long that takes: whoever sends it may have to wait for the interpreter's lock.
        """
        if self._end.acquire(blocking=False) or isinstance(sys.exception(), _Stop):
            return
        while not self._is_sent:
            time.sleep(_POLL_S)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), None)

    def _now_s(self) -> float:
        return time.monotonic() if self._clock is None else time.clock_gettime(self._clock)
