"""What a program in a container reads and writes, over the connection that the engine hijacks for it."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable

#: The engine's frame around each piece: which output, three zeros, how many bytes.
_HEADER = struct.Struct(">BxxxI")
_STDERR = 2
_RECEIVE_BYTES = 256 << 10
#: Kept of what the program says on its standard error, for a message.
_MAX_COMPLAINT_BYTES = 2000
#: A piece that the engine sends has some 32 KiB.
_MAX_PIECE_BYTES = 16 << 20


class ExecStream:
    """A ``Stream`` (``broker.protocol.tunnel``) to a program that the engine has started. For one thread.

    Args:
        connection: Hijacked; a TLS connection too.
        early: Bytes that were read from it together with the engine's reply.
        release: Called when it is closed: lets go of what the connection came from.
    """

    def __init__(
        self, connection: socket.socket, early: bytes = b"", release: Callable[[], None] = lambda: None
    ) -> None:
        connection.setblocking(False)
        self._connection, self._release = connection, release
        self._inbox = bytearray(early)
        self._complaints = b""
        self._first = bool(early)

    def read_fd(self) -> int:
        """See ``Stream.read_fd``."""
        return self._connection.fileno()

    write_fd = read_fd

    def read(self) -> bytes | None:
        """See ``Stream.read``.

        Raises:
            OSError: The connection broke, or what came is not the engine's.
        """
        while True:
            if self._first:
                self._first = False
            else:
                try:
                    received = self._connection.recv(_RECEIVE_BYTES)
                except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    return None
                if not received:
                    return b""
                self._inbox += received
            if output := self._unpacked():
                return output

    def write(self, data: bytes | memoryview) -> int:
        """See ``Stream.write``."""
        try:
            return self._connection.send(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def read_line(self, *, timeout_s: float, max_bytes: int = 4096) -> bytes:
        """Wait for the program's first line and return it with whatever came after it.

        Raises:
            TimeoutError: None came in time.
            OSError: The connection broke.
            EOFError: The program ended before; the text is what it said.
        """
        give_up_at = time.monotonic() + timeout_s
        line = b""
        while b"\n" not in line and len(line) < max_bytes:
            received = self.read()
            if received == b"":
                raise EOFError(self.complaints(line))
            if received is None:
                self._wait(give_up_at)
            line += received or b""
        return line

    def complaints(self, said: bytes = b"") -> str:
        """Return what the program wrote to its standard error, fit for a message.

        Args:
            said: What it wrote to its standard output, where an old engine puts its own errors.
        """
        text = (said + self._complaints)[-_MAX_COMPLAINT_BYTES:].decode("utf-8", "replace")
        return " ".join("".join(each if each.isprintable() else " " for each in text).split())

    def close(self) -> None:
        """Close the connection: the program reads the end of its input."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._release()

    def _wait(self, give_up_at: float) -> None:
        left_s = give_up_at - time.monotonic()
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise TimeoutError("the program in the sandbox says nothing")

    def _unpacked(self) -> bytes:
        """Take whole and partial pieces out of the engine's frames; keep what cannot be told yet."""
        inbox, at, output = self._inbox, 0, []
        while len(inbox) - at >= _HEADER.size:
            kind, size = _HEADER.unpack_from(inbox, at)
            if kind > _STDERR or size > _MAX_PIECE_BYTES:
                raise OSError(f"what came is not the engine's: {bytes(inbox[at : at + 200])!r}")
            end = at + _HEADER.size + size
            if end > len(inbox):
                break
            piece = bytes(memoryview(inbox)[at + _HEADER.size : end])
            if kind == _STDERR:
                self._complaints = (self._complaints + piece)[-_MAX_COMPLAINT_BYTES:]
            else:
                output.append(piece)
            at = end
        del inbox[:at]
        return output[0] if len(output) == 1 else b"".join(output)
