"""Claims about spinning: only where the last wait was short, never for long, and by one thread at a time."""

from __future__ import annotations

import itertools
import os
import select
import threading
from collections.abc import Iterator

import pytest

from broker.protocol import spinner
from broker.protocol.spinner import SPIN_S, Spinner

LOOK_S = 2e-6


class Clock:
    """Time, and whoever else is on the processor: to yield it takes ``yielded_s``."""

    def __init__(self) -> None:
        self.now, self.yielded_s = 100.0, 0.0

    def monotonic(self) -> float:
        return self.now

    def sched_yield(self) -> None:
        self.now += self.yielded_s


class Script:
    """Stands in for ``select.poll``: each wait takes so long, and ends with descriptor 7."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.ready_at = clock, 0.0
        self.slept: list[float | None] = []
        self.looks = 0

    def poll(self, timeout_ms: float | None = None) -> list[tuple[int, int]]:
        if timeout_ms == 0:
            self.looks += 1
            self.clock.now += LOOK_S
        else:
            self.slept.append(timeout_ms)
            self.clock.now = max(self.clock.now, self.ready_at)
        return [(7, select.POLLIN)] if self.clock.now >= self.ready_at else []


class Waiting:
    """A spinner, and how each of its waits went."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.spinner = clock, Spinner(moves=True)

    def wait(self, takes_s: float, *, spins: bool = True) -> tuple[int, bool]:
        """Return how often it looked, and whether it slept."""
        poll = Script(self.clock)
        poll.ready_at = self.clock.now + takes_s
        assert self.spinner.wait(poll, spins=spins) == [7]  # type: ignore[arg-type]
        return poll.looks, bool(poll.slept)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(spinner, "time", made)
    monkeypatch.setattr("broker.protocol.spinner.os.sched_yield", made.sched_yield)
    monkeypatch.setattr(spinner, "_WORTH_IT", True)
    return made


@pytest.fixture
def waiting(clock: Clock) -> Waiting:
    return Waiting(clock)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_it_sleeps_first_and_spins_after_a_short_wait(waiting: Waiting) -> None:
    assert waiting.wait(SPIN_S / 2) == (1, True)
    looks, slept = waiting.wait(SPIN_S / 2)
    assert (looks > 5, slept) == (True, False)


def test_a_long_wait_costs_one_spin_and_the_next_one_none(waiting: Waiting) -> None:
    waiting.wait(SPIN_S / 2)
    looks, slept = waiting.wait(10.0)
    assert (looks <= SPIN_S / LOOK_S + 3, slept) == (True, True)
    assert waiting.wait(10.0) == (1, True)
    assert waiting.wait(SPIN_S / 2) == (1, True)
    assert waiting.wait(SPIN_S / 2)[1] is False


def test_what_is_there_already_is_returned_at_once(waiting: Waiting) -> None:
    assert waiting.wait(0) == (1, False)


def test_a_question_is_answered_at_once_and_changes_nothing(waiting: Waiting, clock: Clock) -> None:
    waiting.wait(SPIN_S / 2)
    poll = Script(clock)
    poll.ready_at = clock.now + 10.0
    assert waiting.spinner.wait(poll, 0) == []  # type: ignore[arg-type]
    assert (poll.looks, poll.slept) == (1, [])
    assert waiting.wait(SPIN_S / 2)[1] is False  # it spins as before


def test_one_thread_of_a_process_spins_at_a_time(waiting: Waiting) -> None:
    waiting.wait(SPIN_S / 2)
    with spinner._spinning:
        assert waiting.wait(SPIN_S / 2) == (1, True)
    assert waiting.wait(SPIN_S / 2)[1] is False


def test_on_one_processor_it_never_spins(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinner, "_WORTH_IT", False)
    for _ in range(3):
        assert waiting.wait(SPIN_S / 2) == (1, True)


def test_where_the_caller_says_so_it_sleeps(waiting: Waiting) -> None:
    waiting.wait(SPIN_S / 2)
    assert waiting.wait(SPIN_S / 2, spins=False) == (1, True)


def test_it_gives_up_where_somebody_else_has_taken_the_processor_for_long(waiting: Waiting, clock: Clock) -> None:
    waiting.wait(SPIN_S / 2)
    clock.yielded_s = spinner._LONG_S * 1.5
    assert waiting.wait(SPIN_S) == (2, True)


def test_it_moves_away_from_who_it_waits_for_but_not_all_the_time(
    waiting: Waiting, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[float] = []
    monkeypatch.setattr(spinner, "_move", lambda: moves.append(clock.now))
    waiting.wait(SPIN_S / 2)
    waiting.wait(SPIN_S / 2)
    assert not moves  # alone on its processor
    clock.yielded_s = spinner._SHARED_S * 2
    for _ in range(100):
        waiting.wait(SPIN_S / 20)
    assert 2 <= len(moves) <= 1 + 100 * SPIN_S / 10 / spinner._MOVE_EVERY_S
    assert all(later - earlier > spinner._MOVE_EVERY_S for earlier, later in itertools.pairwise(moves))


def test_to_move_leaves_a_thread_the_processors_that_it_had() -> None:
    allowed = os.sched_getaffinity(0)
    for _ in range(10):
        spinner._move()
        assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize("soon", [False, True])
def test_with_a_real_poll_it_finds_what_is_ready_and_keeps_to_its_time(pipe: tuple[int, int], soon: bool) -> None:
    reading, writing = pipe
    poll, waits = select.poll(), Spinner()
    poll.register(reading, select.POLLIN)
    waits._is_soon = soon
    assert waits.wait(poll, 0.001) == []
    writer = threading.Timer(0.05, os.write, (writing, b"x"))
    writer.start()
    assert waits.wait(poll) == [reading]
    writer.join()
    assert waits.wait(poll, 0) == [reading]
