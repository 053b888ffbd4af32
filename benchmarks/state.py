"""What one contender's process keeps between samples."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.processes import Processes, used_ns


def double(n: int) -> int:
    """Return twice ``n``; the host tool that every contender calls."""
    return 2 * n


TOOLS: dict[str, Callable[..., Any]] = {"double": double}


class WrongAnswer(Exception):
    """A contender answered something else than was asked for: an error, never a fast sample."""


def timed(action: Callable[[], Any], expected: Any) -> float:
    """Run one action and return its wall time in seconds.

    Raises:
        WrongAnswer: It gave something else than expected.
    """
    begin = time.perf_counter()
    got = action()
    took = time.perf_counter() - begin
    if got != expected:
        raise WrongAnswer(f"expected {expected!r:.80}, got {got!r:.80}")
    return took


def metered(processes: Processes, action: Callable[[], Any], expected: Any) -> dict[str, float]:
    """Run one action; return ``wall_s``, ``cpu_s`` and the CPU seconds of each role, ``cpu_host_s`` and so on.

    Raises:
        WrongAnswer: It gave something else than expected.
    """
    before = used_ns(processes)
    wall_s = timed(action, expected)
    after = used_ns(processes)
    spent = {f"cpu_{role}_s": (after[role] - before[role]) / 1e9 for role in processes}
    return {"wall_s": wall_s, "cpu_s": sum(spent.values()), **spent}


class State:
    """The warm interpreters of one contender, each started when a case first asks for it.

    Args:
        contender: Who is measured.
    """

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self._warm: dict[str, Any] = {}
        self._sessions: list[Any] = []
        self._factory: Callable[[], Any] | None = None
        self._open: Callable[[], Any] | None = None
        self._stack = contextlib.ExitStack()

    def warm(self, variant: str = "plain") -> Any:
        """Return a started interpreter that the cases share."""
        if variant not in self._warm:
            interpreter = self.contender.make(TOOLS, variant)
            self._stack.callback(interpreter.shutdown)
            interpreter.execute("1 + 1")
            self._warm[variant] = interpreter
        return self._warm[variant]

    def fresh(self) -> Any:
        """Return an interpreter made directly; nothing is started."""
        return self.contender.make(TOOLS)

    def from_factory(self) -> Any:
        """Return an interpreter of the factory that a program would use again and again."""
        if self._factory is None:
            self._factory = self.contender.factory(TOOLS)
        return self._factory()

    def sessions(self, count: int) -> list[Any]:
        """Return that many started interpreters, sharing what they can; more are opened where needed."""
        if self._open is None:
            self._open = self._stack.enter_context(self.contender.opener(TOOLS))
        while len(self._sessions) < count:
            interpreter = self._open()
            self._stack.callback(interpreter.shutdown)
            interpreter.execute("1 + 1")
            self._sessions.append(interpreter)
        return self._sessions[:count]

    def processes(self, variant: str) -> Processes:
        """Return the processes of a warm interpreter by role, this one included."""
        return {"host": [os.getpid()], **self.contender.processes(self.warm(variant))}

    def drop_lost(self) -> None:
        """Forget warm interpreters that no longer answer, so that what comes next gets new ones."""
        for variant, interpreter in list(self._warm.items()):
            try:
                interpreter.execute("1 + 1")
            except Exception:
                del self._warm[variant]

    def close(self) -> None:
        """Shut everything down."""
        self._stack.close()
