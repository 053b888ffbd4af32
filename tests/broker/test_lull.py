"""Claims about the lull: nothing that is waited for is left unread, and nobody who rings holds the broker up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

import gevent
import pytest

from broker.lull import Bell, Lull
from broker.testing import InProcessBroker
from tests.broker.conftest import Client


class FakeLine:
    """Has as many pieces to read as it is given."""

    def __init__(self) -> None:
        self.watched, self.pieces, self.reads = True, 0, 0

    def attend(self, wanted: bool) -> None:
        self.watched = wanted

    def read_now(self) -> bool:
        self.reads += 1
        self.pieces, had = max(0, self.pieces - 1), self.pieces
        return had > 0


class Lines:
    """A lull over two of them."""

    def __init__(self) -> None:
        self.worker, self.host = FakeLine(), FakeLine()
        self.lull = Lull(lambda: (self.worker, self.host), self._read)

    def _read(self) -> bool:
        from_worker = self.worker.read_now()
        return self.host.read_now() or from_worker

    @property
    def watched(self) -> tuple[bool, bool]:
        return self.worker.watched, self.host.watched

    def until_watched(self) -> None:
        give_up_at = time.monotonic() + 20
        while not all(self.watched):
            assert time.monotonic() < give_up_at
            gevent.sleep(0.001)


@pytest.fixture
def lines() -> Iterator[Lines]:
    made = Lines()
    yield made
    made.lull.close()


def test_nothing_is_watched_while_something_comes_and_all_of_it_as_soon_as_nothing_does(lines: Lines) -> None:
    lines.worker.pieces, lines.host.pieces = 3, 5
    lines.lull.begin()
    assert lines.watched == (False, False)
    lines.until_watched()
    assert (lines.worker.pieces, lines.host.pieces) == (0, 0)
    assert lines.host.reads == 6  # the last one found nothing


def test_a_lull_that_has_begun_begins_again_without_harm_and_after_its_end_anew(lines: Lines) -> None:
    for _ in range(2):
        lines.lull.begin()
        lines.lull.begin()
        lines.lull.end()
        assert lines.watched == (True, True)
        lines.lull.end()
    reads = lines.host.reads
    gevent.sleep(0.01)
    assert lines.host.reads == reads  # the timer stands still
    lines.lull.begin()
    lines.until_watched()
    assert lines.host.reads == reads + 1


def test_what_was_left_is_watched_again_whoever_is_there_by_then(lines: Lines) -> None:
    lines.lull.begin()
    before, lines.worker = lines.worker, FakeLine()
    lines.lull.end()
    assert before.watched


def test_a_closed_lull_leaves_nothing_unwatched(lines: Lines) -> None:
    lines.lull.begin()
    lines.lull.close()
    assert lines.watched == (True, True)
    lines.lull.begin()
    assert lines.watched == (True, True)


class Rings:
    """A bell, and how often it was heard."""

    def __init__(self) -> None:
        self.heard = 0
        self.bell = Bell(self._rung)

    def _rung(self) -> None:
        self.heard += 1

    def until_heard(self, count: int) -> None:
        give_up_at = time.monotonic() + 20
        while self.heard < count:
            assert time.monotonic() < give_up_at
            gevent.sleep(0.001)


@pytest.fixture
def rings() -> Iterator[Rings]:
    made = Rings()
    yield made
    made.bell.close()


def test_a_bell_is_heard_and_once_for_many_rings(rings: Rings) -> None:
    for count in (1, 2):
        for _ in range(100):
            os.write(rings.bell.fileno(), b"\0")
        rings.until_heard(count)
    gevent.sleep(0.01)
    assert rings.heard == 2


def test_a_bell_that_is_full_rings_still(rings: Rings) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(rings.bell.fileno(), b"\0" * 4096)
    rings.until_heard(1)
    os.write(rings.bell.fileno(), b"\0")
    rings.until_heard(2)


def test_whoever_holds_the_other_end_cannot_make_the_broker_wait(rings: Rings) -> None:
    theirs = rings.bell.fileno()
    fcntl.fcntl(theirs, fcntl.F_SETFL, fcntl.fcntl(theirs, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    assert not os.get_blocking(rings.bell._ours)
    rings.bell._rung()  # it was rung, and somebody else was quicker
    assert rings.heard == 1


def test_a_closed_bell_gives_its_descriptors_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    made = Rings()
    made.bell.close()
    made.bell.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptors_and_timers_of_sessions_are_given_back(real: InProcessBroker) -> None:
    def rounds(count: int) -> int:
        for _ in range(count):
            client = Client.open(real)
            client.run("1")
            client.close()
        return len(os.listdir("/proc/self/fd"))

    before = rounds(2)
    give_up_at = time.monotonic() + 20
    while rounds(5) > before + 2:
        assert time.monotonic() < give_up_at
