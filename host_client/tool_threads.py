"""Threads for tools: made when all are busy, used again, ended at shutdown."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

Job = Callable[[], None]
#: Idle threads end on their own beyond this many.
_MAX_IDLE = 64
#: Idle threads end within microseconds; this only bounds a machine under load.
_JOIN_S = 1.0


class ToolThreads:
    """Runs jobs on daemon threads.

    How many jobs run at once is the caller's to limit. A job that hangs keeps its thread, and the next job gets
    another one. Idle threads hold no reference to anything but this object.
    """

    def __init__(self) -> None:
        # Guards _idle, _closed and _pid: an inbox in _idle has a thread that waits for exactly one job.
        # Reentrant, because the garbage collector may close the session in any thread, also in one that is in here.
        self._lock = threading.RLock()
        self._idle: list[queue.SimpleQueue[Job | None]] = []
        self._threads: dict[queue.SimpleQueue[Job | None], threading.Thread] = {}
        self._closed = False
        self._pid = os.getpid()

    def run(self, job: Job) -> None:
        """Run ``job`` on an idle thread, or on a new one. After ``close`` on a new one, which then ends."""
        with self._lock:
            if self._pid != os.getpid():  # after a fork: the threads stayed with the parent
                self._idle, self._threads, self._pid = [], {}, os.getpid()
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = self._start()
        inbox.put(job)

    def close(self) -> None:
        """End the idle threads now, and each busy one when its job ends. Idempotent; safe from a job."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            ending = [self._threads[inbox] for inbox in idle]
        for inbox in idle:
            inbox.put(None)
        for thread in ending:
            thread.join(_JOIN_S)

    def _start(self) -> queue.SimpleQueue[Job | None]:
        inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._work, args=(inbox,), name="rlm-sandbox tool", daemon=True)
        with self._lock:
            self._threads[inbox] = thread
        thread.start()
        return inbox

    def _work(self, inbox: queue.SimpleQueue[Job | None]) -> None:
        while (job := inbox.get()) is not None:
            try:
                job()
            except BaseException:  # a job reports its own errors; whatever escapes it must not end the thread
                log.exception("a tool's thread failed")
            del job  # it holds the tool's arguments
            if not self._await_another(inbox):
                break
        with self._lock:
            self._threads.pop(inbox, None)

    def _await_another(self, inbox: queue.SimpleQueue[Job | None]) -> bool:
        with self._lock:
            if self._closed or len(self._idle) >= _MAX_IDLE:
                return False
            self._idle.append(inbox)
            return not self._closed
