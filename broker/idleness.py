"""How long a session has had nothing to do, and when that has been too long."""

from __future__ import annotations

from broker.tool_calls import Clock


class Idleness:
    """Counts from the last beginning or end of anything that a client did with a session.

    Args:
        ttl_s: A session's time to live without work in seconds, or None for no end.
        clock: Monotonic seconds; a machine that sleeps does not age.
    """

    __slots__ = ("_clock", "_since", "ttl_s")

    def __init__(self, ttl_s: float | None, clock: Clock) -> None:
        self.ttl_s, self._clock = ttl_s, clock
        self._since = clock()

    def begin_anew(self) -> None:
        """Something was done."""
        self._since = self._clock()

    def idle_s(self) -> float:
        """Return for how long nothing was done."""
        return self._clock() - self._since

    def ends_at(self) -> float | None:
        """Return the clock time at which it has been too long, or None."""
        return None if self.ttl_s is None else self._since + self.ttl_s
