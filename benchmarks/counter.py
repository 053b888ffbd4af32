"""The profile function that counts calls. Standard library only: the worker's process imports it too."""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_OURS = tuple(str(_ROOT / package) + "/" for package in ("host_client", "broker"))
_SOCKET_CALLS = frozenset({"send", "sendall", "sendmsg", "recv", "recv_into", "recvmsg", "poll", "select"})


class Counter:
    """A profile function for all threads; counts by role and metric.

    Args:
        role: Whose process this is; the broker's thread in it is told apart by ``broker_is``.
    """

    def __init__(self, role: str) -> None:
        self._role = role
        self._broker: int | None = None
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """See ``sys.setprofile``; only single operations on a counter, so threads need no lock for what we read."""
        role = "broker" if threading.get_ident() == self._broker else self._role
        if event == "call":
            ours = frame.f_code.co_filename.startswith(_OURS)
            self._counts[role, "own_calls" if ours else "library_calls"] += 1
        elif event == "c_call":
            if argument.__name__ in _SOCKET_CALLS:
                self._counts[role, "socket_calls"] += 1
            if frame.f_code.co_filename.startswith(_OURS):
                self._counts[role, "built_in_calls"] += 1

    def start(self) -> None:
        """Count in this thread and in those started from here on."""
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count for as long as this is entered."""
        self.start()
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type, unused-ignore]

    def broker_is(self, thread: threading.Thread) -> None:
        """Say which thread is the broker's."""
        self._broker = thread.ident

    def of_this_process(self) -> dict[str, int]:
        """Return the counts of this process' own role so far, by metric."""
        return {metric: number for (role, metric), number in self.snapshot().items() if role == self._role}

    def snapshot(self) -> collections.Counter[tuple[str, str]]:
        """Return the counts so far."""
        return collections.Counter(self._counts)
