"""While executions go by the lane, the broker is told of each but asked for nothing: it reads of many at a time.

To wake a process costs whoever writes to it 15 us here, and the process as much again. So while the lane is in use,
nothing wakes the broker that can wait for ``LULL_S``: it does not watch the connections on which host and worker tell
it what they do, and reads them when a timer says so. Whoever needs it at once makes it read them (``catch_up``), or,
where that is the worker, rings a bell that it watches. See ``docs/decisions/022-tool-calls-on-the-lane.md``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import gevent

#: Far below what a person or a deadline notices. What it reads then takes it about a tenth of that time: the seldomer,
#: the fewer executions meet it on a processor that they would have had.
LULL_S = 0.02

_READABLE = 1
#: What an execution may take of a processor that is offered to it.
_SHORTLY_S = 0.0005
#: What a pipe holds: one read takes all.
_MOST_RINGS = 64 << 10


class _Manners:
    """Lets others have the processor between two frames that nobody waits for.

    Host and worker wait for each other on two processors, of which the broker takes one: whoever was on it would wait
    until all is read, which may be two milliseconds. So it offers its place after each frame; where somebody takes it
    for long, who is busy with something else, no more until the next reading.
    """

    def __init__(self) -> None:
        self._yields = False

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Read in this block what can wait."""
        self._yields = True
        try:
            yield
        finally:
            self._yields = False

    def give_way(self) -> None:
        """A frame has been dealt with."""
        if self._yields:
            began = time.monotonic()
            os.sched_yield()
            self._yields = time.monotonic() - began < _SHORTLY_S


manners = _Manners()


class Line(Protocol):
    """A connection that can be left unwatched."""

    def attend(self, wanted: bool) -> None:
        """Read what arrives as it arrives, or only when told to. Idempotent."""

    def read_now(self) -> bool:
        """Take in what has arrived; tell whether that was anything."""


class Bell:
    """A pipe that wakes the broker; who holds the other end rings it by writing into it.

    No eventfd: that is one open file for both sides, and generated code could make our reading of it wait.

    Args:
        on_ring: Called when it was rung, once for all that was rung since.
    """

    def __init__(self, on_ring: Callable[[], None]) -> None:
        self._on_ring = on_ring
        # Ours stays open: without anybody who can ring, the pipe would be at its end, and readable for ever.
        self._ours, self._theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watcher = gevent.get_hub().loop.io(self._ours, _READABLE)
        self._watcher.start(self._rung)

    def fileno(self) -> int:
        """Return the descriptor to hand over."""
        return self._theirs

    def close(self) -> None:
        """Close this end. Idempotent."""
        if self._ours >= 0:
            self._watcher.stop()
            self._watcher.close()
            os.close(self._ours)
            os.close(self._theirs)
            self._ours = self._theirs = -1

    def _rung(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._ours, _MOST_RINGS)
        self._on_ring()


class Lull:
    """Leaves connections unwatched while something comes on them at least every ``LULL_S``.

    Args:
        lines: Returns them as they are now.
        read: Takes in what has arrived on all of them, in order; tells whether that was anything.
    """

    def __init__(self, lines: Callable[[], tuple[Line, ...]], read: Callable[[], bool]) -> None:
        self._lines, self._read = lines, read
        self._left: tuple[Line, ...] = ()
        self._timer = gevent.get_hub().loop.timer(0.0, LULL_S)
        self._closed = False

    def begin(self) -> None:
        """Watch nothing for a while."""
        if self._left or self._closed:
            return
        self._left = self._lines()
        for line in self._left:
            line.attend(False)
        self._timer.again(self._look)  # after LULL_S, and again each LULL_S

    def end(self) -> None:
        """Watch everything again. Idempotent."""
        left, self._left = self._left, ()
        if left:
            self._timer.stop()
            for line in left:
                line.attend(True)

    def close(self) -> None:
        """As ``end``, for good."""
        self._closed = True
        self.end()
        self._timer.stop()
        self._timer.close()

    def _look(self) -> None:
        with manners.kept():
            found = self._read()
        if not found:
            self.end()
