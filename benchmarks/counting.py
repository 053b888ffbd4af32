"""Counts what one operation on the hot path does: function calls, not seconds. ``python -m benchmarks.counting``.

The real host side and the real broker run in this process, in threads of their own, with real workers; a profile
function counts calls by thread. A busy machine makes that slower and changes no count, so a test can compare them with
a budget. The worker is a process of its own and is not counted.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.state import TOOLS

_ROOT = Path(__file__).resolve().parents[1]
_OURS = tuple(str(_ROOT / package) + "/" for package in ("host_client", "broker"))
_BROKER_THREAD = "in-process-broker"
_SOCKET_CALLS = frozenset({"send", "sendall", "sendmsg", "recv", "recv_into", "recvmsg", "poll", "select"})
#: What is counted, and what it stands for.
METRICS = {
    "own_calls": "calls of functions in host_client and broker",
    "library_calls": "calls of Python functions in libraries",
    "built_in_calls": "calls of built-in functions from our code",
    "socket_calls": "reads, writes and polls of sockets",
}
#: Operations over which a count is averaged: what one of them does late falls into the next.
_OPERATIONS = 100
_WARM_UP = 20
_TEXT = "v" * (1 << 20)

Counts = dict[str, dict[str, dict[str, int]]]


class Counter:
    """A profile function for all threads; counts by role and metric."""

    def __init__(self) -> None:
        self._broker: int | None = None
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """See ``sys.setprofile``; only single operations on a counter, so threads need no lock for what we read."""
        role = "broker" if threading.get_ident() == self._broker else "host"
        if event == "call":
            ours = frame.f_code.co_filename.startswith(_OURS)
            self._counts[role, "own_calls" if ours else "library_calls"] += 1
        elif event == "c_call":
            if argument.__name__ in _SOCKET_CALLS:
                self._counts[role, "socket_calls"] += 1
            if frame.f_code.co_filename.startswith(_OURS):
                self._counts[role, "built_in_calls"] += 1

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count in this thread and in those started from here on."""
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type, unused-ignore]

    def broker_is(self, thread: threading.Thread) -> None:
        """Say which thread is the broker's."""
        self._broker = thread.ident

    def snapshot(self) -> collections.Counter[tuple[str, str]]:
        """Return the counts so far."""
        return collections.Counter(self._counts)


def _operations(interpreter: Any) -> dict[str, Callable[[], Any]]:
    return {
        "execution": lambda: interpreter.execute("1 + 1"),
        "execution with one tool call": lambda: interpreter.execute("double(21)"),
        "execution with an unchanged 1 MiB str": lambda: interpreter.execute("len(text)", {"text": _TEXT}),
    }


def count() -> Counts:
    """Return the counts of one operation: by operation, role and metric."""
    # Here, not above: what coverage or another profiler sees of these imports is not ours to disturb.
    from broker.testing import InProcessBroker
    from host_client import SandboxInterpreter, SandboxSettings
    from host_client.providers.fake import FakeProvider

    counter = Counter()
    settings = SandboxSettings(journal=":memory:")
    with counter.counting(), InProcessBroker() as broker:
        [thread] = [one for one in threading.enumerate() if one.name == _BROKER_THREAD]
        counter.broker_is(thread)
        with SandboxInterpreter(tools=TOOLS, settings=settings, provider=FakeProvider(broker)) as interpreter:
            return {name: _counted(counter, run) for name, run in _operations(interpreter).items()}


def _counted(counter: Counter, run: Callable[[], Any]) -> dict[str, dict[str, int]]:
    for _ in range(_WARM_UP):
        run()
    before = counter.snapshot()
    for _ in range(_OPERATIONS):
        run()
    used = counter.snapshot() - before
    return {
        role: {metric: round(used[role, metric] / _OPERATIONS) for metric in METRICS} for role in ("host", "broker")
    }


if __name__ == "__main__":
    print(json.dumps(count(), indent=1))
