"""Making generated code leave although it catches everything.

An exception alone does not end ``while True: try: ... except BaseException: pass``. So a trace function raises it
again at every next line of generated code, until no such frame is left on the stack. Frames of libraries are not
torn: their ``finally`` and ``with`` run, as does the ``__exit__`` of a ``with`` in generated code (a lock must not
stay locked in the next execution); ``except`` and ``finally`` blocks in generated code do not.
"""

from __future__ import annotations

import _thread
import contextlib
import opcode
import signal
import sys
import threading
import time
import types
from typing import Any

from broker.worker.cells import is_generated

# Raw threads, bound before ``threads`` tags the starting of threads.
_start_new_thread = _thread.start_new_thread

# A handler that neither reaches a new line nor calls anything is reminded by a signal after this ...
_FIRST_REMINDER_S = 0.05
# ... and a library that does not return after this.
_PATIENCE_S = 1.0

_WITH_EXCEPT_START = opcode.opmap["WITH_EXCEPT_START"]
_PUSH_EXC_INFO = opcode.opmap.get("PUSH_EXC_INFO")  # from Python 3.11 on


class ExecutionSubmitted(SystemExit):
    """Ends the execution after SUBMIT. A SystemExit: asyncio lets those through, threads end silently by them."""


class Unwinding:
    """Raises an exception at each next line of generated code in the calling thread.

    Args:
        error: What to raise.
    """

    def __init__(self, error: type[BaseException]) -> None:
        self._error = error
        self._since_s = time.monotonic()
        self._hooks_before: tuple[Any, Any] | None = None
        self._watched = False
        # Guards _stopped: no reminder is sent once stop() has returned, lest it hit the next execution.
        self._lock = _thread.allocate_lock()
        self._stopped = False
        # Released by stop(), so that the reminding thread ends at once.
        self._done = _thread.allocate_lock()
        self._done.acquire()

    def start(self, frame: types.FrameType) -> None:
        """Begin, with ``frame`` the innermost one; the caller raises the exception the first time."""
        outermost = _outermost_generated(frame)
        if outermost is None or (outermost is frame and _catches_nothing(frame.f_code)):
            return
        if self._hooks_before is None:
            self._hooks_before = sys.gettrace(), sys.getprofile()
        self._arm(frame)
        sys.setprofile(self._profile)

    def remind(self, frame: types.FrameType) -> bool:
        """Arm again after a reminder, and tell whether to raise in ``frame`` now (libraries get some time)."""
        if not is_generated(frame.f_code) and time.monotonic() - self._since_s < _PATIENCE_S:
            return False
        self.start(frame)
        return True

    def stop(self) -> None:
        """Restore the hooks of before, and send no more reminders. Idempotent."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        self._done.release()
        if self._hooks_before is not None:
            trace, profile = self._hooks_before
            sys.setprofile(profile)
            sys.settrace(trace)

    def watch(self) -> None:
        """Something still runs: see that it does not run for long. Only the main thread can be signalled."""
        if self._watched or threading.get_ident() != threading.main_thread().ident:
            return
        self._watched = True
        with contextlib.suppress(RuntimeError):  # no thread to be had: the deadline remains
            _start_new_thread(self._send_reminders, ())

    def _arm(self, frame: types.FrameType | None) -> None:
        while frame is not None:
            if is_generated(frame.f_code):
                frame.f_trace = self._trace
                frame.f_trace_lines = True
            frame = frame.f_back
        sys.settrace(self._trace)

    def _trace(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        if not is_generated(frame.f_code):
            return None
        if event in ("line", "call") and not _leaves_with_block(frame):
            self.watch()
            raise self._error
        return self._trace

    def _profile(self, frame: types.FrameType, event: str, arg: Any) -> None:
        """Switch the trace function on again: the interpreter switches one off that raises."""
        if event == "return":
            if _outermost_generated(frame.f_back) is None and is_generated(frame.f_code):
                self.stop()
                return
        else:
            self.watch()
        if sys.gettrace() is None and not self._stopped:
            self._arm(frame)

    def _send_reminders(self) -> None:
        delay_s = _FIRST_REMINDER_S
        while not self._done.acquire(True, delay_s):
            with self._lock:
                if self._stopped:
                    return
                signal_main_thread()
            delay_s = min(delay_s * 2, _PATIENCE_S)


def signal_main_thread() -> None:
    """Send SIGINT to the main thread; ``Interrupts`` knows what is meant by it."""
    ident = threading.main_thread().ident
    if ident is not None:
        signal.pthread_kill(ident, signal.SIGINT)


def is_below(frame: types.FrameType | None, code: types.CodeType) -> bool:
    """Tell whether ``frame`` was called, directly or not, by a frame that runs ``code``."""
    frame = None if frame is None or frame.f_code is code else frame.f_back
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def _outermost_generated(frame: types.FrameType | None) -> types.FrameType | None:
    found = None
    while frame is not None:
        if is_generated(frame.f_code):
            found = frame
        frame = frame.f_back
    return found


def _catches_nothing(code: types.CodeType) -> bool:
    """Tell whether a function has no ``try`` and no ``with`` at all (unknown before Python 3.11)."""
    return getattr(code, "co_exceptiontable", None) == b""


def _leaves_with_block(frame: types.FrameType) -> bool:
    """Tell whether the frame is about to call the ``__exit__`` of a ``with`` that the exception leaves."""
    code, at = frame.f_code.co_code, max(frame.f_lasti, 0)
    if code[at] == _PUSH_EXC_INFO:
        at += 2
    return at < len(code) and code[at] == _WITH_EXCEPT_START
