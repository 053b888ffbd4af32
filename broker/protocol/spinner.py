"""Waiting for a word that is about to come: to look for it again and again, for a moment, before going to sleep.

To put a process to sleep and to wake it again costs more here than what most executions do in between: of 0.2 ms for an
execution over the lane, more than half. See ``docs/decisions/023-spinning.md``.
"""

from __future__ import annotations

import os
import select
import threading
import time

#: Somebody who waits longer than this sleeps; at most so much CPU time is wasted when a wait is longer than the last.
SPIN_S = 300e-6

#: Held by the one thread of this process that spins: more would take the interpreter lock away from each other.
_spinning = threading.Lock()


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


#: Alone on its processor, whoever spins keeps the other one from working. macOS has no yield for a busy neighbour.
_WORTH_IT = hasattr(os, "sched_yield") and _processors() > 1


class Spinner:
    """Waits for one kind of word. It spins where the last one came soon: the next one probably does.

    Where waits are long, as between the executions of an RLM, it costs one spin after the last short one.
    """

    def __init__(self) -> None:
        self._is_soon = False

    def wait(self, poll: select.poll, timeout_s: float | None = None) -> list[int]:
        """Wait until one of the descriptors in ``poll`` is ready.

        Args:
            poll: Descriptors.
            timeout_s: In seconds; None waits for ever.

        Returns:
            The descriptors that are ready, or that something is wrong with; none where the time is over.
        """
        if ready := poll.poll(0):
            self._is_soon = True
        else:
            began = time.monotonic()
            if self._is_soon and _WORTH_IT:
                ready = _spin(poll, began + SPIN_S)
            ready = ready or poll.poll(None if timeout_s is None else timeout_s * 1000)
            self._is_soon = time.monotonic() - began < SPIN_S
        return [fd for fd, _ in ready]


def _spin(poll: select.poll, until: float) -> list[tuple[int, int]]:
    if not _spinning.acquire(blocking=False):
        return []
    try:
        while not (ready := poll.poll(0)) and time.monotonic() < until:
            os.sched_yield()  # to whoever shares this processor: it may be the one that is waited for
        return ready
    finally:
        _spinning.release()
