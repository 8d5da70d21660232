"""Who is charged for the time of grammars, by a clock that only the work itself moves on."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from trivium.executor.grammar_times import GrammarTimes


class World:
    """GrammarTimes, and what masks and tokens cost, in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.num_readings = 0
        self.times = GrammarTimes()
        monkeypatch.setattr("trivium.executor.grammar_times.time.thread_time", self._read)

    def steps(self, count: int, masks_s: Mapping[int, float], tokens_s: Mapping[int, float] | None = None) -> list[int]:
        """The slots found slow in `count` steps, in order; masks_s and tokens_s: slot -> seconds."""
        slow = []
        for _ in range(count):
            self.times.compute_masks(list(masks_s), lambda _, slot: self._work(masks_s[slot]))
            if tokens_s:
                self.times.consume(list(tokens_s), lambda _, slot: self._work(tokens_s[slot]))
            slow += self.times.take_slow(list(masks_s))
        return slow

    def _work(self, seconds: float) -> None:
        self.now_s += seconds

    def _read(self) -> float:
        self.num_readings += 1
        return self.now_s


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_slow_row_is_found_and_its_neighbours_are_not(world: World) -> None:
    assert world.steps(300, {3: 0.004, 5: 0.015, 9: 0.004}) == [5, 5]


def test_a_row_alone_is_charged_from_its_first_step(world: World) -> None:
    assert world.steps(1, {5: 1.01}) == [5]


def test_the_first_slow_step_beside_others_is_charged_to_nobody(world: World) -> None:
    assert world.steps(1, {4: 0.0, 5: 1.5}) == []
    assert world.steps(1, {4: 0.0, 5: 1.5}) == [5]


def test_tokens_count_as_masks_do(world: World) -> None:
    masks_s = {3: 0.001, 5: 0.001}
    assert world.steps(300, masks_s, {3: 0.001, 5: 0.013}) == [5, 5]
    assert world.steps(1, masks_s, {5: 1.1}) == [5]


def test_many_quick_rows_are_never_slow(world: World) -> None:
    assert world.steps(300, dict.fromkeys(range(100), 0.0045)) == []


def test_debts_are_paid_by_what_steps_allow(world: World) -> None:
    world.steps(60, {3: 0.0, 5: 0.02})  # 59 charged: 0.885
    assert world.steps(100, {3: 0.0, 5: 0.0}) == []
    assert world.steps(35, {3: 0.0, 5: 0.02}) == []  # 0.385 + 35 times 0.015
    assert world.steps(10, {3: 0.0, 5: 0.02}) == [5]


def test_a_row_that_is_forgotten_leaves_no_debts(world: World) -> None:
    world.steps(60, {3: 0.0, 5: 0.02})
    world.times.forget(5)
    assert world.steps(60, {3: 0.0, 5: 0.02}) == []


def test_quick_rows_are_timed_together(world: World) -> None:
    world.steps(1, dict.fromkeys(range(32), 1e-5), dict.fromkeys(range(32), 1e-6))
    assert world.num_readings == 4
