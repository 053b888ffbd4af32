"""Waiting for a word that is about to come: to look for it again and again, for a moment, before going to sleep.

To put a process to sleep and to wake it again costs more here than what most executions do in between: of 0.2 ms for an
execution over the lane, more than half. See ``docs/decisions/023-spinning.md``.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time

#: Somebody who waits longer than this sleeps; at most so much CPU time is wasted when a wait is longer than the last.
SPIN_S = 1e-3

#: Whoever yields the processor and has it back only after so long shares it.
_SHARED_S = 8e-6
#: So long an execution does not have it, nor a part of one.
_LONG_S = 1e-4
#: Between two moves to another processor, each of which takes about 20 us.
_MOVE_EVERY_S = 2e-3

#: Held by the one thread of this process that spins: more would take the interpreter lock away from each other.
_spinning = threading.Lock()


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


#: Alone on its processor, whoever spins keeps the other one from working.
_WORTH_IT = hasattr(os, "sched_yield") and _processors() > 1


class Spinner:
    """Waits for one kind of word. It spins where the last one came soon: the next one probably does.

    Where waits are long, as between the executions of an RLM, it costs one spin after the last short one.

    Args:
        moves: Whether this thread moves away where it shares its processor with who it waits for. The kernel put them
            there when the one woke the other, and while neither sleeps it leaves them there for milliseconds.
    """

    def __init__(self, *, moves: bool = False) -> None:
        self._is_soon = False
        self._moves, self._moved_at = moves, 0.0

    def wait(self, poll: select.poll, timeout_s: float | None = None, *, spins: bool = True) -> list[int]:
        """Wait until one of the descriptors in ``poll`` is ready.

        Args:
            poll: Descriptors.
            timeout_s: In seconds; None waits for ever.
            spins: Whether it may, where the caller knows how busy this process is.

        Returns:
            The descriptors that are ready, or that something is wrong with; none where the time is over.
        """
        if ready := poll.poll(0):
            self._is_soon = True
        elif timeout_s != 0:  # else it was a question, and tells nothing of how long a wait takes
            began = time.monotonic()
            if self._is_soon and spins and _WORTH_IT:
                ready, shared = _spin(poll, began, began + SPIN_S)
                if shared and self._moves and began - self._moved_at > _MOVE_EVERY_S:
                    self._moved_at = began
                    _move()
            ready = ready or poll.poll(None if timeout_s is None else timeout_s * 1000)
            self._is_soon = time.monotonic() - began < SPIN_S
        return [fd for fd, _ in ready]


def _spin(poll: select.poll, now: float, until: float) -> tuple[list[tuple[int, int]], bool]:
    """Look until something is ready or the time is up; return what is ready, and whether the processor is shared.

    Where somebody has taken the processor for long and what is waited for has not come, others have work to do: they
    shall have it, or whoever spins is served again and again, and nobody else.
    """
    ready: list[tuple[int, int]] = []
    shared = False
    if not _spinning.acquire(blocking=False):
        return ready, False
    try:
        while not ready and now < until:
            os.sched_yield()  # to whoever shares this processor: it may be the one that is waited for
            looked, now = now, time.monotonic()
            ready = poll.poll(0)
            shared = shared or now - looked > _SHARED_S
            if not ready and now - looked > _LONG_S:
                return ready, False
        return ready, shared
    finally:
        _spinning.release()


def _move() -> None:
    """Have this thread go on on another processor, if it may use one; it may use the same ones as before."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # not ours to choose, or no /proc
        allowed = os.sched_getaffinity(0)
        with open("/proc/thread-self/stat", "rb") as stat:
            here = int(stat.read().rpartition(b")")[2].split()[36])
        if others := allowed - {here}:
            os.sched_setaffinity(0, others)
            os.sched_setaffinity(0, allowed)
