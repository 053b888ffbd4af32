"""What an execution prints: one pipe each, a bounded part kept, the rest counted and thrown away."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import fcntl
import os
import sys
import termios
from collections import deque
from collections.abc import Callable

import gevent

from broker.protocol import limits

#: Fewer wake-ups for code that prints much; the kernel's default is 64 KiB.
PIPE_BYTES = 256 << 10

_READ_BYTES = 64 << 10

#: Pipes of ended executions that left-over processes still hold. The oldest is closed first; its writers get SIGPIPE.
MAX_LEFT_OVER_PIPES = 8


@dataclasses.dataclass(slots=True)
class Output:
    """What was printed.

    Attributes:
        text: The part that was kept; bytes that are no UTF-8 are replaced.
        discarded_bytes: How much was thrown away.
    """

    text: str = ""
    discarded_bytes: int = 0


class OutputBuffer:
    """Keeps the first bytes and counts the rest.

    Args:
        max_bytes: Bytes kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._kept = bytearray()
        self.discarded_bytes = 0

    def add(self, data: bytes) -> None:
        """Take in what was read off the pipe."""
        if self._room >= len(data):
            self._kept += data
            self._room -= len(data)
        else:
            self._kept += data[: self._room]
            self.discarded_bytes += len(data) - self._room
            self._room = 0

    @property
    def kept(self) -> bytes:
        """What was kept, as it came."""
        return bytes(self._kept)

    def output(self) -> Output:
        """Return what is there so far; a character that the limit cut in two is left out."""
        if not self._kept:
            return Output(discarded_bytes=self.discarded_bytes)
        text, _ = codecs.utf_8_decode(self._kept, "replace", not self.discarded_bytes)
        return Output(text, self.discarded_bytes)


class OutputPipe:
    """The reading end of one execution's pipe, emptied by the event loop.

    Args:
        on_overflow: Called once when more was thrown away than ``MAX_DISCARDED_OUTPUT_BYTES``.
        on_end: Called once when the pipe is closed.
    """

    def __init__(self, on_overflow: Callable[[], None], on_end: Callable[[OutputPipe], None]) -> None:
        self._buffer, self._max_bytes = OutputBuffer(0), 0
        self._on_overflow, self._on_end = on_overflow, on_end
        self._carried = b""
        self._taken = self._overflowed = False
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        # For the worker, to read as well. Not a duplicate: that is one open file for both, and generated code could
        # make our reading of it wait.
        try:
            path = f"/proc/self/fd/{self._read_end}"
            self.second_read_end = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # out of descriptors
            os.close(self._read_end)
            os.close(self.write_end)
            raise
        with contextlib.suppress(OSError):  # past the user's share of pipe memory the default must do
            fcntl.fcntl(self._read_end, 1031, PIPE_BYTES)  # F_SETPIPE_SZ has no name in Python 3.9's fcntl
        self._watcher = gevent.get_hub().loop.io(self._read_end, 1)

    def begin(self, max_bytes: int, *, watch: bool = True) -> None:
        """Keep so many bytes of what comes from now on; without ``watch``, what fits into the pipe stays in there."""
        self._buffer, self._max_bytes = OutputBuffer(max_bytes), max_bytes
        self._buffer.add(self._carried)
        self._carried = b""
        self._taken = self._overflowed = False
        if watch:
            self.watch()

    def watch(self) -> None:
        """Read what comes as it comes."""
        if not self._watcher.active:
            self._watcher.start(self._readable)

    def rest(self) -> None:
        """Read nothing until the next execution: nobody holds the pipe who could write."""
        self._watcher.stop()

    @property
    def closed(self) -> bool:
        """Whether it has come to its end."""
        return self._read_end < 0

    def close_workers_ends(self) -> None:
        """Close our copies of the worker's ends once it has its own."""
        if self.write_end >= 0:
            os.close(self.write_end)
            os.close(self.second_read_end)
            self.write_end = self.second_read_end = -1

    def take(self, rest: str = "") -> Output:
        """Return what was printed up to now. Later output is read and thrown away, so that no writer blocks.

        Args:
            rest: The last of it, which is not in the pipe any more.
        """
        self.close_workers_ends()
        left = self._bytes_waiting()
        while left > 0 and self._read_end >= 0:
            left -= self._read(min(left, _READ_BYTES)) or left
        self._taken = True
        if rest:
            self._buffer.add(rest.encode())
        output = self._buffer.output()
        self._buffer = OutputBuffer(0)
        return output

    def leave(self, printed: str) -> Output:
        """End an execution whose output is known: what is here is of the next one, not yet heard of.

        Args:
            printed: The output.
        """
        self._carried = self._buffer.kept
        self.rest()
        if not printed:
            return Output()
        buffer = OutputBuffer(self._max_bytes)
        buffer.add(printed.encode())
        return buffer.output()

    def close(self) -> None:
        """Close both ends. Idempotent."""
        self.close_workers_ends()
        if self._read_end < 0:
            return
        self._watcher.stop()
        self._watcher.close()
        os.close(self._read_end)
        self._read_end = -1
        self._on_end(self)

    def _bytes_waiting(self) -> int:
        if self._read_end < 0:
            return 0
        return int.from_bytes(fcntl.ioctl(self._read_end, termios.FIONREAD, b"\0\0\0\0"), sys.byteorder)

    def _readable(self) -> None:
        self._read(_READ_BYTES)

    def _read(self, size: int) -> int:
        """Read once; return the number of bytes, 0 where there are none or the pipe has ended."""
        try:
            data = os.read(self._read_end, size)
        except BlockingIOError:
            return 0
        if not data:
            self.close()
            return 0
        self._buffer.add(data)
        if self._buffer.discarded_bytes > limits.MAX_DISCARDED_OUTPUT_BYTES and not self._overflowed:
            self._overflowed = True
            if self._taken:  # a left-over process that prints without end
                self.close()
            else:
                self._on_overflow()
        return len(data)


class OutputPipes:
    """The pipes of one session: the running execution's, and a few that left-over processes hold.

    Args:
        on_overflow: Called when the running execution prints far too much.
    """

    def __init__(self, on_overflow: Callable[[], None]) -> None:
        self._on_overflow = on_overflow
        self._current: OutputPipe | None = None
        self._next: OutputPipe | None = None
        self._kept: OutputPipe | None = None
        self._left_over: deque[OutputPipe] = deque()
        self._closed = False

    def open(self, max_bytes: int) -> OutputPipe:
        """Return a fresh pipe for the execution that starts."""
        pipe, self._next = self._next or OutputPipe(self._on_overflow, self._ended), None
        self._current = pipe
        pipe.begin(max_bytes)
        return pipe

    def reopen(self, max_bytes: int, *, watch: bool = True) -> bool:
        """Let the next execution print into the pipe of the last one, if that was kept; tell whether it was.

        Args:
            max_bytes: Bytes kept.
            watch: Read what comes as it comes, else only from ``watch()`` on.
        """
        pipe, self._kept = self._kept, None
        if pipe is None or pipe.closed:
            return False
        self._current = pipe
        pipe.begin(max_bytes, watch=watch)
        return True

    def watch(self) -> None:
        """Read what the running execution prints, as it comes."""
        if self._current is not None and not self._current.closed:
            self._current.watch()

    def prepare(self) -> None:
        """Make the next execution's pipe, now that there is time."""
        if self._next is None and not self._closed:
            self._next = OutputPipe(self._on_overflow, self._ended)

    def take(self, rest: str = "", *, keep: bool = False) -> Output:
        """Return what the execution printed.

        Args:
            rest: The last of it, which the worker has taken out of the pipe.
            keep: Nobody but the worker holds the pipe, and it may be used again.
        """
        pipe, self._current = self._current, None
        if pipe is None:
            return Output()
        output = pipe.take(rest)
        if keep and not pipe.closed:
            self._kept = pipe
            pipe.rest()
        elif not pipe.closed:
            self._left_over.append(pipe)
        if len(self._left_over) > MAX_LEFT_OVER_PIPES:
            self._left_over[0].close()
        return output

    def leave(self, printed: str) -> Output:
        """Keep the pipe, and whatever is in it, for the next execution; return what this one printed.

        Args:
            printed: All of it, which the worker has taken out of the pipe.
        """
        pipe, self._current = self._current, None
        if pipe is None:
            return Output()
        output = pipe.leave(printed)
        if not pipe.closed:
            self._kept = pipe
        return output

    def close(self) -> None:
        """Close every pipe."""
        self._closed = True
        for pipe in [*self._left_over, self._current, self._next, self._kept]:
            if pipe is not None:
                pipe.close()

    def _ended(self, pipe: OutputPipe) -> None:
        with contextlib.suppress(ValueError):
            self._left_over.remove(pipe)
