"""The only place where requests wait. Everything below it is synchronous; everything above it asks here."""

from __future__ import annotations

import time
from collections.abc import Callable

import gevent
from gevent.event import Event

from broker.tool_calls import Clock


class Bell:
    """Wakes the requests that wait for news of one thing."""

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
        if at is None or self._closed or (self._set_for is not None and self._set_for <= at):
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
