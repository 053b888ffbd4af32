"""SIGINT: raised inside generated code, remembered just before it, ignored otherwise."""

from __future__ import annotations

import importlib
import signal
import types
from collections.abc import Callable
from typing import Any, TypeVar

from broker.worker.current import Current, Execution
from broker.worker.event_loop import raise_in_loop
from broker.worker.unwinding import ExecutionSubmitted, Unwinding, is_below

T = TypeVar("T")

# The functions of ``signal`` turn everything into enums, which costs more than the system calls.
_signal: Any = importlib.import_module("_signal")
_SIGINT, _SIG_UNBLOCK = int(signal.SIGINT), int(signal.SIG_UNBLOCK)
_SIGINT_ONLY = (_SIGINT,)


def interruptible(function: Callable[..., T], *args: Any) -> T:
    """Call a function; the signal handler raises only below this frame, so the worker's own code is never torn."""
    return function(*args)


class Interrupts:
    """The worker's SIGINT handler.

    The first SIGINT of an execution raises an ordinary KeyboardInterrupt. A further one also raises it again at each
    next line until generated code has been left: code that catches everything keeps its namespace that way.

    Args:
        current: What runs now.
        on_interrupt: Called once per interrupted execution, to let go of threads that wait for the host.
    """

    def __init__(self, current: Current, on_interrupt: Callable[[], None]) -> None:
        self._current = current
        self._on_interrupt = on_interrupt

    def restore(self) -> None:
        """Install the handler unless it is there, and unblock the signal."""
        if _signal.getsignal(_SIGINT) != self._handle:
            signal.signal(signal.SIGINT, self._handle)
        _signal.pthread_sigmask(_SIG_UNBLOCK, _SIGINT_ONLY)

    def _handle(self, signum: int, frame: types.FrameType | None) -> None:
        execution = self._current.execution
        if execution is None:
            return
        inside = is_below(frame, interruptible.__code__)
        if execution.submission is not None:
            if inside and frame is not None:
                self._leave_submitted(execution, frame)
            return
        execution.interrupts += 1
        if not inside or frame is None:
            return  # Not begun yet: the REPL looks at the count before it runs anything.
        if execution.interrupts == 1:
            self._on_interrupt()
            self._raise(execution, frame, KeyboardInterrupt)
            return
        if execution.unwinding is None:
            execution.unwinding = Unwinding(KeyboardInterrupt)
            execution.unwinding.start(frame)
        elif not execution.unwinding.remind(frame):
            return
        raise KeyboardInterrupt

    def _leave_submitted(self, execution: Execution, frame: types.FrameType) -> None:
        """SUBMIT was called elsewhere (then this is its signal), or generated code does not leave (a reminder)."""
        if execution.unwinding is None:
            execution.unwinding = Unwinding(ExecutionSubmitted)
            execution.unwinding.start(frame)
            execution.unwinding.watch()
            self._raise(execution, frame, ExecutionSubmitted)
        elif execution.unwinding.remind(frame):
            raise ExecutionSubmitted

    def _raise(self, execution: Execution, frame: types.FrameType, error: type[BaseException]) -> None:
        """Raise here, or from a callback where an event loop's own code runs."""
        if not raise_in_loop(frame, error, still_wanted=lambda: self._current.execution is execution):
            raise error
