"""A clock that only moves when it is told to."""

from __future__ import annotations


class FakeClock:
    """Stands for ``time.monotonic``.

    Args:
        now: Its first reading, in seconds.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move time forward."""
        self.now += seconds
