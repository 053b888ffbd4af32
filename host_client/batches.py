"""What many threads want at once, done by one of them for all: a flush of the disk, an exchange with the broker."""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class _Seat(Generic[Item]):
    """One thread's item, and what it waits on."""

    __slots__ = ("_woken", "done", "item")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.done = False
        self._woken = _thread.allocate_lock()
        self._woken.acquire()

    def wait(self) -> None:
        """Wait until it is done, or this thread is the one to do the next batch."""
        self._woken.acquire()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is awake, or gone
            self._woken.release()


class Batches(Generic[Item]):
    """Does together what has gathered while the batch before was done.

    The first thread does its own at once. Whoever comes meanwhile waits, and when it is done, the first of those does
    the next batch: it is chosen before the others are woken, so that nobody stands in its way.

    Args:
        do: Does a batch, and notes in each item what came of it. Its errors are raised in the one thread that ran it,
            and leave nobody waiting: an item of which nothing was noted was not done.
        most: Items of one batch, or None.
    """

    def __init__(self, do: Callable[[list[Item]], None], most: int | None = None) -> None:
        self._do, self._most = do, most
        self._begin_anew()
        _all.add(self)

    def _begin_anew(self) -> None:
        # Guards the three below.
        self._lock = threading.Lock()
        self._waiting: list[_Seat[Item]] = []
        self._leader: _Seat[Item] | None = None
        self._leading_thread = 0

    @property
    def waiting(self) -> int:
        """How many wait for the next batch."""
        return len(self._waiting)

    def join(self, item: Item) -> None:
        """Return when the item was done, or its batch was cut short, with others or alone; by this thread or another.

        From within ``do`` (the garbage collector may run anything) it is done alone, at once.
        """
        if self._leading_thread == threading.get_ident():
            self._do([item])
            return
        seat = _Seat(item)
        try:
            with self._lock:
                self._waiting.append(seat)
                leads = self._leader is None
                if leads:
                    self._leader = seat
            if not leads:
                seat.wait()
            if not seat.done:
                self._lead()
        finally:
            if not seat.done or self._leader is seat:  # interrupted
                self._leave(seat)

    def _lead(self) -> None:
        batch: list[_Seat[Item]] = []
        try:
            with self._lock:
                batch = self._waiting[: self._most]
                del self._waiting[: self._most]
            self._leading_thread = threading.get_ident()
            self._do([each.item for each in batch])
        finally:
            self._leading_thread = 0
            for each in batch:
                each.done = True
            self._pass_on()
            for each in batch:
                each.wake()

    def _leave(self, seat: _Seat[Item]) -> None:
        """Take back what nobody has begun to do."""
        with self._lock:
            if seat in self._waiting:
                self._waiting.remove(seat)
            leads = self._leader is seat
        if leads:
            self._pass_on()

    def _pass_on(self) -> None:
        with self._lock:
            self._leader = self._waiting[0] if self._waiting else None
            leader = self._leader
        if leader is not None:
            leader.wake()


_all: weakref.WeakSet[Batches[Any]] = weakref.WeakSet()


def _begin_all_anew() -> None:
    """In a forked child the locks may be held by threads that are not there."""
    for each in list(_all):
        each._begin_anew()


os.register_at_fork(after_in_child=_begin_all_anew)
