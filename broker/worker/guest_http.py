"""A lean client for the guest plane: kept connections over the Unix socket, one call at a time each, framed or HTTP."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from broker.protocol import frames, limits
from broker.protocol.blob_file import ANCILLARY_BYTES, AVAILABLE, BlobFile, as_bytes, close_all, descriptors, rights
from broker.protocol.frames import Blob
from broker.worker.errors import BrokerGone

# After an execution, so many connections stay open; within one, a burst of calls uses them again and again.
_MAX_IDLE = 8
_MAX_IDLE_IN_BURST = 256
# A long poll is answered after MAX_WAIT_S at the latest; a broker silent for so much longer hangs.
_SILENCE_S = int(limits.MAX_WAIT_S) + 60
_MAX_HEAD_BYTES = 64 << 10
_READ_BYTES = 64 << 10
_JOIN_BYTES = 64 << 10
# One for a kept connection that the broker had closed, one for bad luck.
_ATTEMPTS = 3
_UPGRADE = "GET /v1/frames HTTP/1.1\r\nHost: guest\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n"
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_FILE_MISSING = 424
_ACCEPT = f"{frames.JSON_CONTENT_TYPE}, {frames.FRAME_CONTENT_TYPE}"


class CallsCut(Exception):
    """The wait was cut off on purpose: the execution ends."""


class FileLost(ConnectionError):
    """A descriptor did not get through: from now on the bytes must."""


class Reply(NamedTuple):
    """A reply: HTTP status, its JSON object, and the blobs beside that."""

    status: int
    body: dict[str, Any]
    blobs: Sequence[Blob]


class _Connection:
    """One socket with the bytes read ahead."""

    __slots__ = ("cut", "files", "framed", "sock")

    def __init__(self, path: str) -> None:
        self.cut = self.framed = self.files = False
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _SILENCE_S, 0))
            self.sock.connect(path)
        except BaseException:
            self.sock.close()
            raise

    def upgrade(self, *, files: bool) -> bool:
        """Ask to speak frames; tell whether the broker agreed. Where it did not, the connection is of no more use."""
        self.sock.sendall((_UPGRADE % (frames.FILES_UPGRADE if files else frames.FRAMED_UPGRADE)).encode("ascii"))
        head, rest = self._head()
        self.framed = head.startswith(b"HTTP/1.1 101 ") and not rest
        self.files = files and self.framed
        return self.framed

    def exchange(self, message: Sequence[Blob]) -> tuple[Reply, bool]:
        """Send a request and read the reply; also tell whether the connection can be used again."""
        for piece in message:
            self.sock.sendall(piece)
        return (self._framed_reply(), True) if self.framed else self._http_reply()

    def exchange_file(self, frame: Blob, file: BlobFile) -> Reply:
        """Send a framed request whose blobs are in a file, and read the reply.

        Raises:
            FileLost: The broker got no descriptor.
        """
        sent = self.sock.sendmsg([frame], rights([file.fd]))
        self.sock.sendall(memoryview(frame)[sent:])
        reply = self._framed_reply()
        if reply.status == _FILE_MISSING:
            raise FileLost("the broker got no descriptor")
        return reply

    def _framed_reply(self) -> Reply:
        assembler = frames.FrameAssembler(files=self.files)
        fds: list[int] = []
        while (frame := assembler.next()) is None:
            size = max(_READ_BYTES, min(assembler.missing, 1 << 20))
            assembler.add(self._receive_with_files(size, fds) if self.files else self._receive(size))
        header, blobs = frame
        if assembler.in_file:
            blobs = _views(header, fds)
        status, body = header.get("status"), header.get("body")
        if type(status) is not int or not isinstance(body, dict):
            raise ConnectionError("the reply is not the guest plane's")
        return Reply(status, body, blobs)

    def _http_reply(self) -> tuple[Reply, bool]:
        head, start = self._head()
        status, length, is_frame, reusable = _parse_head(head)
        if len(start) > length:
            raise ConnectionError("the reply is longer than announced")
        body: Blob = start if len(start) == length else self._rest(start, length)
        try:
            header, blobs = frames.load_frame(body) if is_frame else (frames.parse_json_object(body), [])
        except frames.FrameError as error:
            raise BrokerGone(f"the sandbox's broker sent no tool call status ({status}): {error}") from None
        return Reply(status, header, blobs), reusable

    def _head(self) -> tuple[bytes, bytes]:
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > _MAX_HEAD_BYTES:
                raise ConnectionError("the reply's head does not end")
            data += self._receive()
        return data[:end], data[end + 4 :]

    def _receive(self, size: int = _READ_BYTES) -> bytes:
        data = self.sock.recv(size)
        if not data:
            raise ConnectionError("the broker closed the connection")
        return data

    def _receive_with_files(self, size: int, fds: list[int]) -> bytes:
        data, ancillary, _, _ = self.sock.recvmsg(size, ANCILLARY_BYTES, _CLOEXEC)
        if ancillary:
            fds += descriptors(ancillary)
        if not data:
            close_all(fds)
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
        self._framed: list[_Connection] = []  # idle ones that speak frames
        self._speaks_frames = True
        self._speaks_files = AVAILABLE
        self._busy: set[_Connection] = set()
        self._freed = threading.Condition()
        self._starving = 0

    def request(
        self, method: str, target: str, body: dict[str, Any] | None = None, blobs: Sequence[Blob | str] = ()
    ) -> Reply:
        """Send a request, again on a new connection where one breaks (so it must be safe to repeat).

        Args:
            method: HTTP method.
            target: Path and query.
            body: JSON object, or None for no body.
            blobs: What its values refer to; ASCII texts as they are.

        Raises:
            BrokerGone: Nothing listens there, connections break again and again, or a reply makes no sense.
            CallsCut: ``cut_waits`` was called meanwhile.
        """
        if blobs and (reply := self._request_by_file(method, target, body, blobs)) is not None:
            return reply
        sent: Sequence[Blob] = as_bytes(blobs) if blobs else ()
        failure: Exception | None = None
        framed = frames.dump_frame({"request": f"{method} {target}", "body": body or {}}, sent)
        fits = sum(map(len, framed)) <= limits.MAX_GUEST_FRAME_BYTES
        for _ in range(_ATTEMPTS):
            connection = self._take(fits)
            try:
                if connection.framed:
                    message: Sequence[Blob] = (b"".join(framed),)
                else:
                    message = _compose(method, target, body, sent)
                reply, reusable = connection.exchange(message)
            except (OSError, frames.FrameError) as error:  # includes the silence time-out
                self._failed(connection, error)
                failure = error
                continue
            except BaseException:
                self._drop(connection)
                raise
            self._give_back(connection, reusable)
            return reply
        raise BrokerGone(f"the sandbox's broker does not answer: {failure}")

    def _request_by_file(
        self, method: str, target: str, body: dict[str, Any] | None, blobs: Sequence[Blob | str]
    ) -> Reply | None:
        """Send large blobs in a file; return None where they are small, or bytes must do."""
        file = BlobFile.worth(blobs) if self._speaks_files else None
        if file is None:
            return None
        try:
            header = {"request": f"{method} {target}", "body": body or {}, "file": True, "blobs": file.lengths}
            [frame] = frames.dump_frame(header)
            return self._send_file(frame, file) if len(frame) <= limits.MAX_GUEST_FRAME_BYTES else None
        finally:
            file.close()

    def _send_file(self, frame: Blob, file: BlobFile) -> Reply | None:
        for _ in range(_ATTEMPTS):
            connection = self._take(True)
            if not connection.files:
                self._give_back(connection, True)
                return None
            try:
                reply = connection.exchange_file(frame, file)
            except (OSError, frames.FrameError) as error:
                self._failed(connection, error)
                continue
            except BaseException:
                self._drop(connection)
                raise
            self._give_back(connection, True)
            return reply
        return None

    def _failed(self, connection: _Connection, error: Exception) -> None:
        """Part with a connection that broke.

        Raises:
            CallsCut: We broke it.
        """
        self._drop(connection)
        if connection.cut:
            raise CallsCut from None
        if isinstance(error, FileLost):
            self._speaks_files = False
            with contextlib.suppress(IndexError):
                while True:
                    self._framed.pop().sock.close()

    def cut_waits(self) -> None:
        """Wake every thread that waits for a reply; it gets ``CallsCut``."""
        for connection in list(self._busy):
            connection.cut = True
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def let_go(self) -> None:
        """Close what a burst of calls has left open."""
        for idle in (self._idle, self._framed):
            while len(idle) > _MAX_IDLE:
                with contextlib.suppress(IndexError):  # another thread took it
                    idle.pop().sock.close()

    def descriptors(self) -> list[int]:
        """Return the descriptors of all connections."""
        return [connection.sock.fileno() for connection in [*self._idle, *self._framed, *self._busy]]

    def forget(self) -> None:
        """In a forked child: close the copies of the parent's connections."""
        for connection in [*self._idle, *self._framed, *self._busy]:
            connection.sock.close()
        self.__init__(self._path)  # type: ignore[misc]  # the locks may be held by threads that are not here

    def _take(self, framed: bool) -> _Connection:
        """Return a connection that nobody uses.

        Frames save time on every call but cost an exchange to begin with: not for those connections of a burst that
        would be closed after one call.
        """
        try:
            connection = (self._framed if framed else self._idle).pop()
        except IndexError:
            connection = self._begin(framed and self._speaks_frames and len(self._busy) < _MAX_IDLE_IN_BURST)
        self._busy.add(connection)
        return connection

    def _begin(self, framed: bool) -> _Connection:
        with contextlib.suppress(IndexError):
            if not framed:
                return self._idle.pop()
        connection = self._connect()
        try:
            if not framed or connection.framed or connection.upgrade(files=self._speaks_files):
                return connection
        except OSError:
            pass  # found out by the request, which is repeated
        except BaseException:
            connection.sock.close()
            raise
        connection.sock.close()
        if self._speaks_files:
            self._speaks_files = False
            return self._begin(framed)
        self._speaks_frames = False
        return self._connect()

    def _connect(self) -> _Connection:
        while True:
            try:
                return _Connection(self._path)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._busy:
                    raise BrokerGone(f"the sandbox's broker is gone: {error}") from None
            self._await_freed()
            for idle in (self._idle, self._framed):
                with contextlib.suppress(IndexError):
                    return idle.pop()

    def _await_freed(self) -> None:
        """Out of descriptors: wait until another thread is done with its connection."""
        with self._freed:
            self._starving += 1
            try:
                if self._busy and not self._idle and not self._framed:
                    self._freed.wait()
            finally:
                self._starving -= 1

    def _give_back(self, connection: _Connection, reusable: bool) -> None:
        self._busy.discard(connection)
        idle = self._framed if connection.framed else self._idle
        stale = connection.files and not self._speaks_files
        if reusable and not connection.cut and not stale and (len(idle) < _MAX_IDLE_IN_BURST or self._starving):
            idle.append(connection)
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


def _views(header: dict[str, Any], fds: Sequence[int]) -> list[memoryview]:
    if not fds:
        raise FileLost("the descriptor of an answer got lost")
    file = BlobFile.received(fds, list(frames.blob_lengths(header, max_bytes=limits.MAX_FRAME_BYTES)))
    try:
        return file.views()
    finally:
        file.close()


def _compose(method: str, target: str, body: dict[str, Any] | None, blobs: Sequence[Blob]) -> list[Blob]:
    head = f"{method} {target} HTTP/1.1\r\nHost: guest\r\nAccept: {_ACCEPT}\r\n"
    if body is None:
        return [f"{head}\r\n".encode("ascii")]
    pieces: Sequence[Blob] = frames.dump_frame(body, blobs) if blobs else (frames.dump_json(body),)
    content_type = frames.FRAME_CONTENT_TYPE if blobs else frames.JSON_CONTENT_TYPE
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
