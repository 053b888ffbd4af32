"""Waiting for a sandbox to become healthy: woken by the kernel, not by a clock."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from broker.protocol.directory_watch import DirectoryWatch

#: Only a safety net, for file systems that tell no events; it bounds how late a missed event is noticed.
_LOOK_AGAIN_S = 0.25
#: After an event something is about to happen of which the kernel tells nothing, such as ``listen``; doubled each time.
_LOOK_AGAIN_AFTER_EVENT_S = 0.002

Result = TypeVar("Result")


class NotReady(Exception):
    """Nothing answers yet."""


class TimedOut(Exception):
    """Nothing answered within the time; the text says what was tried last."""


class Died(Exception):
    """The sandbox ended instead of answering."""


def wait_until_ready(
    probe: Callable[[float], Result],
    *,
    watch: DirectoryWatch,
    pid: int | None,
    is_running: Callable[[], bool],
    timeout_s: float,
) -> Result:
    """Return what ``probe`` returns once it no longer raises ``NotReady``.

    Args:
        probe: Asks the sandbox; given the seconds that are left.
        watch: On the directory in which the socket will appear.
        pid: The sandbox's first process as this host sees it, or None where it cannot be known.
        is_running: Asks the engine; called when the process ended, or when it cannot be watched.
        timeout_s: How long to wait at most.

    Raises:
        TimedOut: The time is over.
        Died: The sandbox ended.
    """
    deadline = time.monotonic() + timeout_s
    last = "nothing tried"
    look_again_s = _LOOK_AGAIN_S
    with _process_watch(pid) as process:
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimedOut(last)
            look_again_s = min(2 * look_again_s, _LOOK_AGAIN_S)
            if watch.drain():
                look_again_s = _LOOK_AGAIN_AFTER_EVENT_S
            try:
                return probe(left_s)
            except NotReady as error:
                last = str(error)
            if _wait(watch, process, min(left_s, look_again_s)):
                continue
            if not is_running():
                raise Died
            # The engine says that it runs: the pid was not the sandbox's (an engine in a virtual machine).
            process = None


def _wait(watch: DirectoryWatch, process: int | None, timeout_s: float) -> bool:
    """Wait for an event; False where the engine should be asked whether the sandbox still runs."""
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    if process is not None:
        poll.register(process, select.POLLIN)
    ready = [fd for fd, _ in poll.poll(timeout_s * 1000)]
    return process not in ready if process is not None else bool(ready)


@contextlib.contextmanager
def _process_watch(pid: int | None) -> Iterator[int | None]:
    """Yield a descriptor that becomes readable when the process ends, or None where there is no such process."""
    fd = None
    with contextlib.suppress(OSError):
        if pid:
            fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)
