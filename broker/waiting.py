"""The only place where requests wait. Everything below it is synchronous; everything above it asks here.

Nothing here needs a greenlet of its own: who waits leaves a function behind, and the event loop calls it when there is
news. A handler that must return the answer (HTTP) waits for that function's word in its greenlet: ``in_greenlet``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import gevent
from gevent.event import AsyncResult, Event

from broker.errors import BrokerError
from broker.tool_calls import Clock

Answer = TypeVar("Answer")
#: Takes an answer, or the error in its place. May be called again only by what says so.
Deliver = Callable[[Answer | BrokerError], None]


class Waiter:
    """One request that waits.

    Args:
        look: Answers the request if it can, and tells whether it has. It is told whether the time is up: then it must.
        key: What it waits for.
        until: Clock time at which the time is up.
    """

    __slots__ = ("key", "look", "until")

    def __init__(self, look: Callable[[bool], bool], key: Hashable, until: float) -> None:
        self.look, self.key, self.until = look, key, until


class WaitingRoom:
    """Requests that wait for news of things, each thing with a key.

    Ringing never calls anybody at once: it is done in the middle of changes, and those who wait look when these are
    complete.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[Hashable, list[Waiter]] = {}
        self._rung: list[Hashable] = []
        self._alarm = Alarm(self._first_end, self._end_times, clock)

    def wait(self, key: Hashable, look: Callable[[bool], bool], wait_s: float) -> Waiter | None:
        """Look once, and again at each ring, until the request is answered.

        Returns:
            What ``leave`` takes, or None where it was answered at once.
        """
        if look(wait_s <= 0):
            return None
        waiter = Waiter(look, key, self._clock() + wait_s)
        self._waiting.setdefault(key, []).append(waiter)
        self._alarm.check_at(waiter.until)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Wait no longer; nobody is there to be answered."""
        waiters = self._waiting.get(waiter.key, [])
        if waiter in waiters:
            waiters.remove(waiter)
            if not waiters:
                del self._waiting[waiter.key]

    def ring(self, key: Hashable) -> None:
        """There is news of this: let those who wait for it look in the next turn of the event loop."""
        if key in self._waiting:
            if not self._rung:
                gevent.get_hub().loop.run_callback(self.answer_rung)
            self._rung.append(key)

    def answer_now(self, key: Hashable) -> None:
        """Let those who wait for this look at once: for who is told before anything else happens."""
        for waiter in list(self._waiting.get(key, ())):
            self._look(waiter, time_is_up=False)

    def close(self) -> None:
        """Answer everybody who waits, as if the time were up."""
        self._alarm.close()
        for waiter in [each for waiters in self._waiting.values() for each in waiters]:
            self._look(waiter, time_is_up=True)

    def answer_rung(self) -> None:
        """Let everybody look now for whom there is news."""
        rung, self._rung = self._rung, []
        for key in dict.fromkeys(rung):
            self.answer_now(key)

    def _look(self, waiter: Waiter, *, time_is_up: bool) -> None:
        if waiter.look(time_is_up):
            self.leave(waiter)

    def _first_end(self) -> float | None:
        return min((each.until for waiters in self._waiting.values() for each in waiters), default=None)

    def _end_times(self) -> None:
        now = self._clock()
        for waiter in [each for waiters in self._waiting.values() for each in waiters if each.until <= now]:
            self._look(waiter, time_is_up=True)


def in_greenlet(room: WaitingRoom, ask: Callable[[Deliver[Any]], Waiter | None]) -> Any:
    """Let the calling greenlet wait for an answer and return it.

    Args:
        room: Where ``ask`` waits.
        ask: Is given the function that takes the answer, and returns what ``WaitingRoom.wait`` returned.

    Raises:
        BrokerError: The answer was one.
    """
    answered: AsyncResult = AsyncResult()
    waiter = ask(answered.set)
    try:
        answer = answered.get()
    finally:
        if waiter is not None:
            room.leave(waiter)
    if isinstance(answer, BrokerError):
        raise answer
    return answer


class Bell:
    """Wakes the greenlets that wait for news of one thing."""

    def __init__(self) -> None:
        self._event = Event()

    def ring(self) -> None:
        """There is news: let those who wait look again."""
        self._event.set()

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``ready()``; look only when the bell rings. Return whether it is so now."""
        give_up_at = time.monotonic() + timeout_s
        while not ready():
            left_s = give_up_at - time.monotonic()
            if left_s <= 0:
                return False
            self._event.clear()
            self._event.wait(left_s)
        return True


class Alarm:
    """Calls back when a moving deadline has come.

    The timer is moved only when the deadline comes nearer; where it went further away, the timer
    fires early once and is set again. So a request that only prolongs a lease costs nothing.

    Args:
        deadline: Returns the clock time, or None.
        due: Called at (or before) that time.
        clock: Monotonic seconds.
    """

    def __init__(self, deadline: Callable[[], float | None], due: Callable[[], None], clock: Clock) -> None:
        self._deadline, self._due, self._clock = deadline, due, clock
        self._timer: gevent.Timeout | None = None
        self._set_for: float | None = None
        self._closed = False

    def check(self) -> None:
        """Set the timer anew if the deadline has come nearer."""
        at = self._deadline()
        if at is not None:
            self.check_at(at)

    def check_at(self, at: float) -> None:
        """Set the timer anew if this clock time, to which the deadline may have moved, is nearer."""
        if self._closed or (self._set_for is not None and self._set_for <= at):
            return
        self._cancel()
        self._set_for = at
        self._timer = gevent.get_hub().loop.timer(max(0.0, at - self._clock()))
        self._timer.start(self._fired)

    def close(self) -> None:
        """Never call back again."""
        self._closed = True
        self._cancel()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
        self._timer, self._set_for = None, None

    def _fired(self) -> None:
        self._cancel()
        self._due()
        self.check()
