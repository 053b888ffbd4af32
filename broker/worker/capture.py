"""Descriptors 1 and 2, and the text streams on them.

Both descriptors lead into the running execution's pipe, and to /dev/null between executions. ``sys.stdout`` and
``sys.stderr`` share one buffer, so that their order is the order of the prints; it is written at each line's end, as
to a terminal: a crash loses nothing, and what a subprocess prints comes where one expects it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

from broker.worker.current import Current

_STDOUT, _STDERR = 1, 2
_buffered_write = io.BufferedWriter.write


class _Buffer(io.BufferedWriter):
    """The shared buffer. Threads of ended executions write into nothing; nobody closes it."""

    def __init__(self, current: Current) -> None:
        raw = io.FileIO(_STDOUT, "wb", closefd=False)
        raw.name = "<stdout>"
        super().__init__(raw)
        self._current = current
        self._abandoned = False

    def write(self, data: Any) -> int:
        if self._current.is_stale():
            return memoryview(data).nbytes
        return _buffered_write(self, data)

    def close(self) -> None:
        """Flush only: a TextIOWrapper that generated code put around this buffer closes it when it is collected."""
        if not self._abandoned:
            self.flush()

    def abandon(self) -> None:
        """Drop what could not be written, lest it come out in a later execution."""
        self._abandoned = True


class _Stream(io.TextIOWrapper):
    """``sys.stdout`` or ``sys.stderr``. Lone surrogates are printed as escapes."""

    def __init__(self, buffer: _Buffer, fd: int) -> None:
        super().__init__(
            buffer, encoding="utf-8", errors="backslashreplace", newline="\n", line_buffering=True, write_through=True
        )
        self._fd = fd
        self.mode = "w"  # type: ignore[misc]

    def fileno(self) -> int:
        return self._fd


class Capture:
    """Leads output into one execution's pipe at a time."""

    def __init__(self, current: Current) -> None:
        self._current = current
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._stdin = sys.stdin
        self._build()
        self.discard()

    def begin(self, fd: int | None) -> None:
        """Lead output into ``fd`` (closed here), and put the streams back that generated code replaced or broke."""
        fd = os.dup(self._null) if fd is None else fd
        os.dup2(fd, _STDOUT)
        os.dup2(fd, _STDERR)
        if fd not in (_STDOUT, _STDERR):
            os.close(fd)
        if not self._intact():
            self._build()
        sys.stdout, sys.stderr = self._stdout, self._stderr
        self._restore_stdin()

    def end(self) -> None:
        """Write out what the streams hold and let go of the pipe."""
        self.flush()
        self.discard()

    def flush(self) -> None:
        """Write out what the streams hold, also those that generated code put in their place."""
        for stream in {id(s): s for s in (sys.stdout, sys.stderr) if s not in (self._stdout, self._stderr)}.values():
            with contextlib.suppress(Exception):
                stream.flush()
        try:
            self._buffer.flush()
        except Exception:  # closed descriptor, broken pipe, full device
            self._buffer.abandon()
            self._build()

    def discard(self) -> None:
        """Lead output to nowhere."""
        os.dup2(self._null, _STDOUT)
        os.dup2(self._null, _STDERR)

    def _build(self) -> None:
        self._buffer = _Buffer(self._current)
        self._stdout, self._stderr = _Stream(self._buffer, _STDOUT), _Stream(self._buffer, _STDERR)
        sys.stdout = sys.__stdout__ = self._stdout  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = self._stderr  # type: ignore[misc]

    def _intact(self) -> bool:
        try:
            return self._stdout.buffer is self._buffer and self._stderr.buffer is self._buffer
        except ValueError:  # detached
            return False

    def _restore_stdin(self) -> None:
        stdin: Any = self._stdin
        if stdin is None or stdin.closed:
            stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
        sys.stdin = sys.__stdin__ = self._stdin = stdin  # type: ignore[misc]
