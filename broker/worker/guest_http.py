"""A lean HTTP/1.1 client for the guest plane: keep-alive connections over the Unix socket, one call at a time each."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

from broker.protocol import frames, limits
from broker.protocol.frames import Blob
from broker.worker.errors import BrokerGone

# After a burst of 1,000 calls, so many connections stay open.
_MAX_IDLE = 8
# A long poll is answered after MAX_WAIT_S at the latest; a broker silent for so much longer hangs.
_SILENCE_S = int(limits.MAX_WAIT_S) + 60
_MAX_HEAD_BYTES = 64 << 10
_READ_BYTES = 64 << 10
_JOIN_BYTES = 64 << 10
# One for a kept connection that the broker had closed, one for bad luck.
_ATTEMPTS = 3
_ACCEPT = f"{frames.JSON_CONTENT_TYPE}, {frames.FRAME_CONTENT_TYPE}"


class CallsCut(Exception):
    """The wait was cut off on purpose: the execution ends."""


class Reply(NamedTuple):
    """A reply: HTTP status, whether the body is a frame (else JSON), the body."""

    status: int
    is_frame: bool
    body: Blob


class _Connection:
    """One socket with the bytes read ahead."""

    __slots__ = ("cut", "sock")

    def __init__(self, path: str) -> None:
        self.cut = False
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _SILENCE_S, 0))
            self.sock.connect(path)
        except BaseException:
            self.sock.close()
            raise

    def exchange(self, pieces: Sequence[Blob]) -> tuple[Reply, bool]:
        """Send a request and read the reply; also tell whether the connection can be used again."""
        for piece in pieces:
            self.sock.sendall(piece)
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > _MAX_HEAD_BYTES:
                raise ConnectionError("the reply's head does not end")
            data += self._receive()
        status, length, is_frame, reusable = _parse_head(data[:end])
        body: Blob = data[end + 4 :]
        if len(body) > length:
            raise ConnectionError("the reply is longer than announced")
        if len(body) < length:
            body = self._rest(body, length)
        return Reply(status, is_frame, body), reusable

    def _receive(self) -> bytes:
        data = self.sock.recv(_READ_BYTES)
        if not data:
            raise ConnectionError("the broker closed the connection")
        return data

    def _rest(self, start: Blob, length: int) -> bytearray:
        body = bytearray(length)
        body[: len(start)] = start
        view, filled = memoryview(body), len(start)
        while filled < length:
            count = self.sock.recv_into(view[filled:])
            if count == 0:
                raise ConnectionError("the broker closed the connection")
            filled += count
        return body


class GuestPlane:
    """Requests to the guest plane from any thread; a forked child starts with connections of its own.

    Args:
        path: The socket ``guest.sock``.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        # list and set operations are atomic; only waiting for a descriptor needs the lock.
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._freed = threading.Condition()
        self._starving = 0

    def request(self, method: str, target: str, pieces: Sequence[Blob] = (), content_type: str = "") -> Reply:
        """Send a request, again on a new connection where one breaks (so it must be safe to repeat).

        Raises:
            BrokerGone: Nothing listens there, or connections break again and again.
            CallsCut: ``cut_waits`` was called meanwhile.
        """
        message = _compose(method, target, pieces, content_type)
        failure: Exception | None = None
        for _ in range(_ATTEMPTS):
            connection = self._take()
            try:
                reply, reusable = connection.exchange(message)
            except OSError as error:  # includes the silence time-out
                self._drop(connection)
                if connection.cut:
                    raise CallsCut from None
                failure = error
                continue
            except BaseException:
                self._drop(connection)
                raise
            self._give_back(connection, reusable)
            return reply
        raise BrokerGone(f"the sandbox's broker does not answer: {failure}")

    def cut_waits(self) -> None:
        """Wake every thread that waits for a reply; it gets ``CallsCut``."""
        for connection in list(self._busy):
            connection.cut = True
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        """In a forked child: close the copies of the parent's connections."""
        for connection in [*self._idle, *self._busy]:
            connection.sock.close()
        self.__init__(self._path)  # type: ignore[misc]  # the locks may be held by threads that are not here

    def _take(self) -> _Connection:
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        self._busy.add(connection)
        return connection

    def _connect(self) -> _Connection:
        while True:
            try:
                return _Connection(self._path)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._busy:
                    raise BrokerGone(f"the sandbox's broker is gone: {error}") from None
            self._await_freed()
            with contextlib.suppress(IndexError):
                return self._idle.pop()

    def _await_freed(self) -> None:
        """Out of descriptors: wait until another thread is done with its connection."""
        with self._freed:
            self._starving += 1
            try:
                if self._busy and not self._idle:
                    self._freed.wait()
            finally:
                self._starving -= 1

    def _give_back(self, connection: _Connection, reusable: bool) -> None:
        self._busy.discard(connection)
        if reusable and not connection.cut and (len(self._idle) < _MAX_IDLE or self._starving):
            self._idle.append(connection)
        else:
            connection.sock.close()
        self._wake_starving()

    def _drop(self, connection: _Connection) -> None:
        self._busy.discard(connection)
        connection.sock.close()
        self._wake_starving()

    def _wake_starving(self) -> None:
        if self._starving:
            with self._freed:
                self._freed.notify()


def _compose(method: str, target: str, pieces: Sequence[Blob], content_type: str) -> list[Blob]:
    head = f"{method} {target} HTTP/1.1\r\nHost: guest\r\nAccept: {_ACCEPT}\r\n"
    if not pieces:
        return [f"{head}\r\n".encode("ascii")]
    size = sum(map(len, pieces))
    first = f"{head}Content-Type: {content_type}\r\nContent-Length: {size}\r\n\r\n".encode("ascii")
    if size <= _JOIN_BYTES:
        return [b"".join([first, *pieces])]
    return [first, *pieces]


def _parse_head(head: bytes) -> tuple[int, int, bool, bool]:
    """Return status, length of the body, whether it is a frame, whether the connection stays open."""
    status_line, *lines = head.lower().split(b"\r\n")
    fields = {name: value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    try:
        status, length = int(status_line.split(b" ", 2)[1]), int(fields[b"content-length"])
    except (KeyError, ValueError, IndexError):
        raise ConnectionError("the reply is not the guest plane's HTTP") from None
    if not 0 <= length <= limits.MAX_FRAME_BYTES:
        raise ConnectionError("the reply is too long")
    is_frame = fields.get(b"content-type", b"").startswith(frames.FRAME_CONTENT_TYPE.encode("ascii"))
    return status, length, is_frame, fields.get(b"connection") != b"close"
