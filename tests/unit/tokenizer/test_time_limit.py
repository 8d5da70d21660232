"""Endless Python code is stopped, its thread goes on, and nothing is stopped that has ended."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest

from trivium.tokenizer.time_limit import TimeLimit, TimeLimitExceededError

WAIT_S = 20


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """One thread, which every job of a test must leave as it was."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def loop_for_ever() -> None:
    while True:
        pass


def watch(limit: TimeLimit, running: Future[object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not running.done():
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(min(limit.check(), 0.05))


def test_an_endless_loop_is_stopped_and_its_thread_goes_on(pool: ThreadPoolExecutor) -> None:
    limit = TimeLimit(0.05)
    running: Future[object] = pool.submit(limit.run, loop_for_ever)
    watch(limit, running)
    with pytest.raises(TimeLimitExceededError):
        running.result()
    assert pool.submit(sum, range(10**6)).result(WAIT_S) == sum(range(10**6))


def test_waiting_uses_no_time(pool: ThreadPoolExecutor) -> None:
    limit = TimeLimit(0.1)
    running: Future[object] = pool.submit(limit.run, lambda: time.sleep(0.4))
    watch(limit, running)
    assert running.result() is None


def test_what_has_ended_is_not_stopped(pool: ThreadPoolExecutor) -> None:
    limit = TimeLimit(0.0)
    assert pool.submit(limit.run, lambda: 7).result(WAIT_S) == 7
    limit.check()
    limit.stop()
    assert pool.submit(sum, range(10**6)).result(WAIT_S) == sum(range(10**6))


def test_what_was_stopped_before_it_begins_does_not_begin(pool: ThreadPoolExecutor) -> None:
    limit, has_run = TimeLimit(1.0), threading.Event()
    limit.stop()
    limit.stop()
    with pytest.raises(TimeLimitExceededError):
        pool.submit(limit.run, has_run.set).result(WAIT_S)
    assert not has_run.is_set()


def test_errors_of_the_work_are_its_own(pool: ThreadPoolExecutor) -> None:
    with pytest.raises(ZeroDivisionError):
        pool.submit(TimeLimit(1.0).run, lambda: 1 // 0).result(WAIT_S)


def test_stopping_at_any_moment_ends_in_a_result_or_an_error_and_hits_nothing_else(
    pool: ThreadPoolExecutor, request: pytest.FixtureRequest
) -> None:
    """The moments around the end of the work are those that matter: an exception must not arrive after it."""

    def after() -> bool:
        for _ in range(2000):  # byte codes in which an exception that came late would be raised
            pass
        return True

    switch_interval_s = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(switch_interval_s))
    sys.setswitchinterval(1e-5)
    outcomes = []
    for trial in range(300):
        limit = TimeLimit(10.0)
        running = pool.submit(limit.run, lambda: sum(1 for _ in range(30_000)))
        later = pool.submit(after)
        time.sleep(1e-5 * trial)
        limit.stop()
        try:
            outcomes.append(running.result(WAIT_S))
        except TimeLimitExceededError:
            outcomes.append(None)
        assert later.result(WAIT_S)
    assert set(outcomes) == {30_000, None}


def test_an_exception_that_is_sent_late_hits_nothing_else(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that sends it may be held up for long, by others that hold the interpreter's lock."""
    send, is_sending = ctypes.pythonapi.PyThreadState_SetAsyncExc, threading.Event()

    def send_late(thread: object, kind: object) -> None:
        if kind is not None:
            is_sending.set()
            time.sleep(1.5)
        send(thread, kind)

    monkeypatch.setattr(ctypes.pythonapi, "PyThreadState_SetAsyncExc", send_late)
    limit = TimeLimit(10.0)
    running = pool.submit(limit.run, is_sending.wait)
    later = pool.submit(lambda: sum(1 for _ in range(3_000_000)))
    while not limit._begin.locked():
        time.sleep(0.001)
    limit.stop()
    with suppress(TimeLimitExceededError):  # the work had ended
        running.result(WAIT_S)
    assert later.result(WAIT_S) == 3_000_000
