"""Descriptors 1 and 2, and the text streams on them.

Both descriptors lead into the running execution's pipe, and to /dev/null between executions, unless nobody but this
process can hold the pipe: then the next execution uses it again. ``sys.stdout`` and
``sys.stderr`` share one buffer, so that their order is the order of the prints; it is written at each line's end, as
to a terminal: a crash loses nothing, and what a subprocess prints comes where one expects it.
"""

from __future__ import annotations

import _thread
import contextlib
import fcntl
import io
import os
import sys
import termios
from collections.abc import Callable
from typing import Any

from broker.protocol import limits
from broker.worker.current import Current

_STDIN, _STDOUT, _STDERR = 0, 1, 2
#: Audit events. Behind ctypes is everything else that starts a process.
_STARTS_PROCESSES = frozenset(
    {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen", "ctypes.dlopen", "ctypes.dlsym"}
)
_buffered_write = io.BufferedWriter.write
_NO_LIMIT = sys.maxsize


class _Buffer(io.BufferedWriter):
    """The shared buffer. Threads of ended executions write into nothing; nobody closes it.

    Args:
        current: Tells them apart.
        on_much: Called once when so much is about to be written since ``room`` was set.

    Attributes:
        room: In bytes.
    """

    def __init__(self, current: Current, on_much: Callable[[], None]) -> None:
        raw = io.FileIO(_STDOUT, "wb", closefd=False)
        raw.name = "<stdout>"
        super().__init__(raw)
        self._current, self._on_much = current, on_much
        self.room = _NO_LIMIT

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self._current.is_stale():
            return size
        self.room -= size
        if self.room < 0:
            self.room = _NO_LIMIT
            self._on_much()
        return _buffered_write(self, data)

    def close(self) -> None:
        """Flush only: a TextIOWrapper that generated code put around this buffer closes it when it is collected."""
        self.flush()


class _Stream(io.TextIOWrapper):
    """``sys.stdout`` or ``sys.stderr``. Lone surrogates are printed as escapes."""

    def __init__(self, buffer: _Buffer, fd: int) -> None:
        super().__init__(
            buffer, encoding="utf-8", errors="backslashreplace", newline="\n", line_buffering=True, write_through=True
        )
        self._fd = fd
        self.mode = "w"  # type: ignore[misc]
        self._own_attributes = len(vars(self)) + 1

    def is_intact(self, buffer: _Buffer) -> bool:
        """Tell whether nobody detached the buffer, closed its file or set attributes such as ``write``."""
        try:
            return self.buffer is buffer and not buffer.raw.closed and len(vars(self)) == self._own_attributes
        except ValueError:  # detached
            return False

    def fileno(self) -> int:
        return self._fd


class Capture:
    """Leads output into one execution's pipe at a time.

    Args:
        current: The running execution.
        on_much: Told when an execution that began with ``alone`` prints more than the pipe should hold.
    """

    def __init__(self, current: Current, on_much: Callable[[], None]) -> None:
        self._current, self._on_much = current, on_much
        # The other end of the pipe, or -1.
        self._reader = -1
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._stdin = sys.stdin
        self._build()
        # Whether a process was started since ``begin`` that may hold the pipe, and may print when it wants.
        self._shared = True
        self._pipe: tuple[int, int] | None = None
        sys.addaudithook(self._watch)
        self.end()

    def begin(self, fd: int | None, reader: int | None = None, *, kept: bool = False, alone: bool = False) -> None:
        """Lead output into ``fd``, which is closed here, or into the pipe that was ``kept``.

        Args:
            fd: Writing end of a pipe.
            reader: Its other end, which is owned from here on.
            kept: Go on with the pipe there is.
            alone: Nobody reads what is printed, for now.
        """
        if kept:
            self._shared = False
            self._restore()
            self._buffer.room = limits.LANE_PIPE_BYTES if alone else _NO_LIMIT
            return
        self._replace_reader(-1 if reader is None else reader)
        fd = os.dup(self._null) if fd is None else fd
        os.dup2(fd, _STDOUT)
        os.dup2(fd, _STDERR)
        if fd in (_STDOUT, _STDERR):
            os.set_inheritable(fd, True)
        else:
            os.close(fd)
        if fd == _STDIN:  # so that one had been closed
            os.dup2(os.open(os.devnull, os.O_RDONLY), _STDIN)
        self._pipe = _identity(_STDOUT)
        self._shared = False
        self._restore()
        self._buffer.room = _NO_LIMIT

    def can_be_kept(self) -> bool:
        """Tell whether nobody else holds the pipe: no process was started, no thread is left, nothing was redirected.

        Code that forks without Python's knowledge is not noticed: what such a process prints later may come out in
        a later execution of its own session.
        """
        return not self._shared and not _thread._count() and _identity(_STDOUT) == self._pipe == _identity(_STDERR)

    def take_back(self, most: int) -> str | None:
        """Take what waits out of the pipe: all that the execution printed, where nobody else has read of it.

        Args:
            most: In bytes.

        Returns:
            It; None, with nothing taken, where it is more, or was left to the broker to read.
        """
        if self._buffer.room > limits.LANE_PIPE_BYTES:
            return None
        waiting = int.from_bytes(fcntl.ioctl(_STDOUT, termios.FIONREAD, b"\0\0\0\0"), sys.byteorder)
        if not waiting:
            return ""
        # By its identity: code that closes descriptors at random may have opened another file under this number.
        if waiting > most or _identity(self._reader) != self._pipe:
            return None
        try:
            return os.read(self._reader, waiting).decode("utf-8", "replace")
        except OSError:
            return None

    def end(self) -> None:
        """Write out what the streams hold, let go of the pipe, and put back streams that were replaced."""
        written = self.flush()
        os.dup2(self._null, _STDOUT)
        os.dup2(self._null, _STDERR)
        if not written:
            self.flush()  # into nothing, lest it come out in a later execution
        self._restore()
        self.close_reader()

    def descriptors(self) -> tuple[int, ...]:
        """Return what is open besides the standard ones."""
        return (self._null,) if self._reader < 0 else (self._null, self._reader)

    def close_reader(self) -> None:
        """Let go of the pipe's reading end: whoever writes when nobody reads any more shall notice."""
        self._replace_reader(-1)

    def leave_pipe(self) -> None:
        """In a copy of the worker: let go of its pipe; what the streams still hold is the other one's to write."""
        os.dup2(self._null, _STDOUT)
        os.dup2(self._null, _STDERR)
        self.end()

    def flush(self) -> bool:
        """Write out what the streams hold, also those that generated code put in their place.

        Returns:
            Whether it worked: the descriptors may be closed, or lead to something full or broken.
        """
        for stream in (getattr(sys, "stdout", None), getattr(sys, "stderr", None)):
            if stream is not self._stdout and stream is not self._stderr and stream is not None:
                with contextlib.suppress(Exception):
                    stream.flush()
        try:
            self._buffer.flush()
        except Exception:
            return False
        return True

    def _watch(self, event: str, _: object) -> None:
        if event in _STARTS_PROCESSES:
            self._shared = True

    def _replace_reader(self, reader: int) -> None:
        if self._reader >= 0 and _identity(self._reader) == self._pipe:
            os.close(self._reader)
        self._reader = reader

    def _build(self) -> None:
        self._buffer = _Buffer(self._current, self._on_much)
        self._stdout, self._stderr = _Stream(self._buffer, _STDOUT), _Stream(self._buffer, _STDERR)
        sys.__stdout__, sys.__stderr__ = self._stdout, self._stderr  # type: ignore[misc]

    def _restore(self) -> None:
        if not (self._stdout.is_intact(self._buffer) and self._stderr.is_intact(self._buffer)):
            self._build()
        sys.stdout, sys.stderr = self._stdout, self._stderr
        self._restore_stdin()

    def _restore_stdin(self) -> None:
        stdin: Any = self._stdin
        if stdin is None or stdin.closed:
            stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
        sys.stdin = sys.__stdin__ = self._stdin = stdin  # type: ignore[misc]


def _identity(fd: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(fd)
    except OSError:  # generated code closed it
        return None
    return found.st_dev, found.st_ino
