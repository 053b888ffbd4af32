"""Ends sandboxes on threads of its own, so that nobody waits for it who need not.

To kill and remove a container costs the engine 50 ms. ``submit`` costs microseconds and takes no lock: the garbage
collector may call it in any thread, at any instruction. The guarantee: the exit of the process waits for what was
submitted; of a process that was killed, the sandboxes end by themselves and the next start removes what is left.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

Job = Callable[[], object]
#: Engines work on removals one after the other; more at once only holds threads.
_MAX_AT_ONCE = 8
#: How long the exit of the process waits for endings: an engine that hangs must not hold it for ever.
EXIT_WAIT_S = 30.0


class Ending:
    """A job that ends something, and whether it is done."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._done = threading.Event()
        self.thread: threading.Thread | None = None

    def run(self) -> None:
        """Do it. Never raises: nobody is there to hear it."""
        try:
            self._job()
        except BaseException:
            log.exception("a sandbox could not be ended; it ends by itself, or a later start removes it")
        finally:
            self._done.set()

    def wait(self, timeout_s: float) -> bool:
        """Return whether it is done, after at most this long."""
        if not self._done.wait(timeout_s):
            return False
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout_s)  # microseconds: it has nothing left to do
        return True


class Endings:
    """The endings of one process."""

    def __init__(self) -> None:
        # Reentrant by design, also for a put that interrupts a put.
        self._inbox: queue.SimpleQueue[Ending] = queue.SimpleQueue()
        # Without a lock: single operations on a dict are atomic, and nothing reads two of them together.
        self._pending: dict[int, Ending] = {}
        self._free = threading.Semaphore(_MAX_AT_ONCE)
        # Guards _dispatcher; never taken by submit.
        self._lock = threading.Lock()
        self._dispatcher: threading.Thread | None = None

    def prepare(self) -> None:
        """Have a thread that waits for endings; to be called where threads can be started, before ``submit``."""
        if self._dispatcher is None:
            with self._lock:
                if self._dispatcher is None:
                    thread = threading.Thread(target=self._dispatch, name="rlm-sandbox endings", daemon=True)
                    thread.start()
                    self._dispatcher = thread

    def submit(self, job: Job) -> Ending:
        """Have something ended soon."""
        ending = Ending(job)
        self._pending[id(ending)] = ending
        self._inbox.put(ending)
        return ending

    def wait(self, timeout_s: float) -> bool:
        """Wait for all that was submitted, also meanwhile; return whether it is done."""
        give_up_at = time.monotonic() + timeout_s
        if self._pending:
            self._prepare_or_run()
        while pending := list(self._pending.values()):
            for ending in pending:
                if not ending.wait(max(0.0, give_up_at - time.monotonic())):
                    return False
                self._pending.pop(id(ending), None)
        return True

    def _prepare_or_run(self) -> None:
        try:
            self.prepare()
        except RuntimeError:  # no thread starts any more: the process exits, and nobody minds waiting
            while not self._inbox.empty():
                self._inbox.get().run()

    def _dispatch(self) -> None:
        while True:
            ending = self._inbox.get()
            self._free.acquire()
            ending.thread = threading.Thread(target=self._run, args=(ending,), name="rlm-sandbox ending", daemon=True)
            try:
                ending.thread.start()
            except RuntimeError:  # as above
                ending.thread = None
                self._run(ending)
            del ending  # it holds a session

    def _run(self, ending: Ending) -> None:
        try:
            ending.run()
        finally:
            self._free.release()
            self._pending.pop(id(ending), None)


# One for each process: a forked child has none of its parent's threads, and must not end what is its parent's.
_of_processes: dict[int, Endings] = {}


def of_this_process() -> Endings:
    """Return the endings of the calling process."""
    return _of_processes.setdefault(os.getpid(), Endings())


def wait_for_endings(timeout_s: float = EXIT_WAIT_S) -> bool:
    """Wait until every sandbox that was let go is gone: container, socket directory, connections.

    ``shutdown`` of an interpreter, and an interpreter that nobody refers to any more, leave that to a thread in the
    background. The exit of the process waits by itself.

    Args:
        timeout_s: Give up after this long, in seconds.

    Returns:
        Whether all of them are gone.
    """
    return of_this_process().wait(timeout_s)
