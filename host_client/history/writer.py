"""Writes the history in the background: whoever records something appends it to a queue and goes on.

One thread for each file and process, there while an interpreter uses it. It gathers for a moment before it writes, so a
run that records much wakes it seldom. Where the history cannot be written, one line in the log says so, and runs go on.
"""

from __future__ import annotations

import atexit
import collections
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator

from host_client.errors import HistoryUnusable
from host_client.history import store
from host_client.history.records import Row
from host_client.history.texts import Mask

log = logging.getLogger(__name__)

MakeRow = Callable[[], Row]

#: How long the thread gathers before it writes.
GATHER_S = 0.2
#: More than this waits only where the disk has hung; what comes then is dropped.
MAX_WAITING = 20_000
#: It ends within milliseconds; this only bounds a machine under load.
_JOIN_S = 1.0
#: Batches between two prunings: a few minutes of a run that never rests.
_PRUNE_EVERY = 1_000


class HistoryWriter:
    """The queue to one file. Safe to use from many threads, and after a fork.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._users = 0
        self._said = self._exiting = False
        self.reset()

    def reset(self) -> None:
        """Begin anew: at first, and in a forked child, where thread, locks, connection and queue are the parent's."""
        # Append and popleft are atomic; what a thread has put is written by whichever thread writes.
        self._waiting: collections.deque[tuple[MakeRow, Mask]] = collections.deque()
        # _awake is true from a put until the thread begins to write: only one of many has to wake it.
        self._wake, self._awake = threading.Event(), False
        self._hurry = threading.Event()
        # Guards _thread and _users: a thread is there, or the next put starts one. Reentrant: the garbage collector may
        # release an interpreter in any thread, also in one that is in here.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        # Held by whoever writes to the file. Guards _db and _batches; the connection is there while the thread is.
        self._writing = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._batches = 0

    def put(self, make: MakeRow, mask: Mask) -> None:
        """Record a row soon, made by then."""
        if len(self._waiting) >= MAX_WAITING:
            self._say("its disk does not keep up; some of it is left out")
            return
        self._waiting.append((make, mask))
        if self._exiting:
            self.flush()
            return
        if not self._awake:
            self._awake = True
            self._wake.set()
        if self._thread is None:
            self._start()

    def acquire(self) -> None:
        """Keep the thread until ``release``."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """The last user lets the thread end, when all is written."""
        with self._lock:
            self._users -= 1
        if self._users <= 0:
            self._hurry.set()
            self._wake.set()

    def join(self) -> None:
        """Wait for the thread to end, where nobody uses it any more; not for ever, and not for a disk that hangs."""
        thread = self._thread
        if thread is not None and self._users <= 0 and thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def flush(self) -> None:
        """Write what waits, on this thread."""
        with self._writing:
            self._write()
            if self._thread is None:
                self._close()

    def exit(self) -> None:
        """Write what waits, and from now on at once: the process ends, and threads with it."""
        self._exiting = True
        self.flush()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._hurry.clear()
                thread = threading.Thread(target=self._work, name="rlm-sandbox history", daemon=True)
                self._thread = thread
                thread.start()

    def _work(self) -> None:
        while True:
            self._wake.wait()
            if self._users > 0:
                self._hurry.wait(GATHER_S)
            self._wake.clear()
            self._awake = False  # then the last look: what is put from here on wakes it again
            self.flush()
            with self._lock:
                if self._users > 0:
                    self._hurry.clear()
                    continue
                # First nobody is there, then the last look: what is put in between starts another thread.
                self._thread = None
                if not self._waiting:
                    break
                self._thread = threading.current_thread()
        with self._writing:
            self._close()

    def _write(self) -> None:
        if not self._waiting:
            return
        try:
            rows = list(self._made())
            if self._db is None:
                self._db = store.connect(self.path)
            store.write(self._db, rows)
            if self._batches % _PRUNE_EVERY == 0:
                store.prune(self._db)
            self._batches += 1
        except (sqlite3.Error, OSError, HistoryUnusable) as error:
            self._say(str(error))
        except Exception as error:  # whatever it is, no run may fail of it
            self._say(f"{type(error).__name__}: {error}")

    def _made(self) -> Iterator[tuple[Row, Mask]]:
        while self._waiting:
            make, mask = self._waiting.popleft()
            try:
                yield make(), mask
            except Exception as error:  # one that cannot be made takes no other with it
                self._say(f"{type(error).__name__}: {error}")

    def _close(self) -> None:
        # A thread that was started in the meantime opens its own.
        if self._db is not None:
            self._db.close()
            self._db = None

    def _say(self, why: str) -> None:
        if not self._said:
            self._said = True
            log.warning("the history of runs (%s) cannot be written, and runs go on without: %s", self.path, why)


_writers: dict[str, HistoryWriter] = {}
# Guards _writers.
_lock = threading.Lock()


def writer_for(path: str) -> HistoryWriter:
    """Return the one writer of a file in this process."""
    with _lock:
        if path not in _writers:
            _writers[path] = HistoryWriter(path)
        return _writers[path]


def flush(path: str) -> None:
    """Write what waits for a file."""
    writer = _writers.get(path)
    if writer is not None:
        writer.flush()


def _reset_all() -> None:
    for writer in _writers.values():
        writer.reset()


os.register_at_fork(after_in_child=_reset_all)


@atexit.register
def _flush_all() -> None:
    for writer in list(_writers.values()):
        writer.exit()
