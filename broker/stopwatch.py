"""The time budget of one execution."""

from __future__ import annotations

from broker.tool_calls import Clock


class Stopwatch:
    """Counts down seconds; can stand still.

    Args:
        budget_s: Seconds until the deadline, or None for no deadline.
        clock: Monotonic seconds.
    """

    def __init__(self, budget_s: float | None, clock: Clock) -> None:
        self._clock = clock
        self._left_s = budget_s
        self._since: float | None = clock()

    def pause(self) -> None:
        """Let time stand still; pausing twice is pausing once."""
        if self._since is None:
            return
        if self._left_s is not None:
            self._left_s -= self._clock() - self._since
        self._since = None

    def resume(self) -> None:
        """Let time run on."""
        if self._since is None:
            self._since = self._clock()

    def deadline(self) -> float | None:
        """Return the clock time of the deadline, or None while there is none."""
        if self._left_s is None or self._since is None:
            return None
        return self._since + self._left_s
