"""Claims about waiting without greenlets: who is answered when, and that everybody is."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

import gevent
import pytest

from broker.errors import SessionLost
from broker.outbox import Outbox
from broker.waiting import WaitingRoom, in_greenlet


class Guest:
    """A request that is answered once something is there."""

    def __init__(self) -> None:
        self.ready, self.answers, self.looks = False, [], 0

    def look(self, time_is_up: bool) -> bool:
        self.looks += 1
        if not self.ready and not time_is_up:
            return False
        self.answers.append("late" if time_is_up else "news")
        return True


@pytest.fixture
def room() -> WaitingRoom:
    return WaitingRoom(time.monotonic)


def turn() -> None:
    """Let the event loop go round."""
    gevent.sleep(0.001)


def test_who_can_be_answered_at_once_does_not_wait(room: WaitingRoom) -> None:
    guest = Guest()
    guest.ready = True
    assert room.wait("a", guest.look, 10.0) is None
    assert guest.answers == ["news"]


def test_who_gives_no_time_is_answered_at_once(room: WaitingRoom) -> None:
    guest = Guest()
    assert room.wait("a", guest.look, 0.0) is None
    assert guest.answers == ["late"]


def test_a_ring_is_heard_in_the_next_turn_by_those_who_wait_for_that(room: WaitingRoom) -> None:
    first, other = Guest(), Guest()
    room.wait("a", first.look, 10.0)
    room.wait("b", other.look, 10.0)
    first.ready = other.ready = True
    room.ring("a")
    room.ring("a")
    assert first.answers == []  # in the middle of a change nobody looks
    turn()
    assert (first.answers, first.looks, other.answers) == (["news"], 2, [])
    room.ring("a")
    turn()
    assert first.looks == 2  # answered once


def test_time_ends_for_each_at_its_own_moment(room: WaitingRoom) -> None:
    late, later = Guest(), Guest()
    room.wait("a", later.look, 30.0)
    room.wait("a", late.look, 0.01)
    with gevent.Timeout(10):
        while not late.answers:
            turn()
    assert (late.answers, later.answers) == (["late"], [])


def test_who_left_is_not_asked_again(room: WaitingRoom) -> None:
    guest = Guest()
    waiter = room.wait("a", guest.look, 10.0)
    assert waiter is not None
    room.ring("a")
    room.leave(waiter)
    room.leave(waiter)
    turn()
    assert guest.looks == 1


def test_at_the_end_everybody_is_answered(room: WaitingRoom) -> None:
    guests = [Guest() for _ in range(3)]
    for guest in guests:
        room.wait("a", guest.look, 10.0)
    room.close()
    assert [guest.answers for guest in guests] == [["late"]] * 3


def test_a_greenlet_gets_the_answer_or_the_error(room: WaitingRoom) -> None:
    def ask(answer: Any) -> Any:
        def wait(deliver: Any) -> Any:
            return room.wait("a", lambda time_is_up: deliver(answer) or True, 10.0)

        return wait

    assert in_greenlet(room, ask("there")) == "there"
    with pytest.raises(SessionLost):
        in_greenlet(room, ask(SessionLost("gone")))


def test_a_greenlet_that_is_killed_waits_no_longer(room: WaitingRoom) -> None:
    guest = Guest()
    greenlet = gevent.spawn(in_greenlet, room, lambda deliver: room.wait("a", guest.look, 10.0))
    turn()
    greenlet.kill()
    room.ring("a")
    turn()
    assert guest.looks == 1


@pytest.fixture
def pair() -> Any:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def test_what_the_kernel_does_not_take_now_leaves_later_in_order(pair: Any) -> None:
    ours, theirs = pair
    emptied = []
    outbox = Outbox(ours, on_empty=lambda: emptied.append(True))
    first = outbox.send([b"a" * 3_000_000, b"b" * 1_000_000])
    assert 0 < first < 4_000_000
    assert outbox.full
    assert outbox.send([b"c" * 10]) == 0
    received = b""
    with gevent.Timeout(30):
        while len(received) < 4_000_010:
            with contextlib.suppress(BlockingIOError):
                received += theirs.recv(1 << 20)
            gevent.sleep(0)
    assert received == b"a" * 3_000_000 + b"b" * 1_000_000 + b"c" * 10
    turn()
    assert (outbox.full, emptied) == (False, [True])
    outbox.close()
    outbox.close()


def test_small_pieces_leave_as_one(pair: Any) -> None:
    ours, theirs = pair
    outbox = Outbox(ours)
    assert outbox.send([b"ab", b"", b"cd"]) == 4
    assert theirs.recv(100) == b"abcd"
    outbox.close()


def test_a_reader_who_goes_away_is_told_once(pair: Any) -> None:
    ours, theirs = pair
    broken = []
    outbox = Outbox(ours, on_broken=lambda: broken.append(True))
    outbox.send([b"a" * 4_000_000])
    theirs.close()
    with gevent.Timeout(10):
        while not broken:
            turn()
    turn()
    assert broken == [True]
    outbox.close()
