"""Requests and replies on a connected socket, HTTP/1.1 or framed; why not a library: decision 002.

The reply counts as hostile: its head and its body are bounded, and the whole exchange has one deadline.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from broker.protocol.blob_file import ANCILLARY_BYTES, BlobFile, close_all, descriptors, rights
from broker.protocol.frames import FILES_UPGRADE, Blob, FrameAssembler, blob_lengths

#: Our broker's heads have some 150 bytes.
_MAX_HEAD_BYTES = 16 << 10
_RECEIVE_BYTES = 64 << 10
#: Bodies up to here are joined to the head: one packet, one wake-up at the other end.
_JOIN_BYTES = 64 << 10
#: What one call of sendmsg is given at most, so that the deadline is looked at now and then.
_SEND_BYTES = 4 << 20
_CLOEXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_END_OF_HEAD = b"\r\n\r\n"
_SWITCHING_PROTOCOLS = 101
_TIMEVAL = struct.Struct("@ll")
#: The kernel counts each call anew: its time-out follows the deadline in steps of this, so that most calls set none.
_ARMED_ANEW_S = 0.05


class BadReply(ValueError):
    """The bytes are not a reply that our broker would send; the message says why."""


class ConnectionEnded(ConnectionError):
    """The other side closed the connection instead of answering.

    Args:
        clean: Whether it did so before the first byte of a reply.
    """

    def __init__(self, *, clean: bool) -> None:
        super().__init__("the connection was closed" if clean else "the connection was closed within a reply")
        self.clean = clean


class FileLost(BadReply):
    """A reply's blobs are in a file whose descriptor did not get here: descriptors are short, or lost on the way."""


class Exchange:
    """Sends requests and reads their replies, one after the other.

    Args:
        connection: Connected; its own time-out is not used from here on.
    """

    def __init__(self, connection: socket.socket) -> None:
        # The kernel's time-outs instead of Python's, which would poll before each call: one system call less.
        connection.setblocking(True)
        self._connection = connection
        self._armed_s = 0.0
        self._deadline = 0.0
        self._frames = FrameAssembler()
        self._takes_files = False
        self._fds: list[int] = []

    def begin(self, timeout_s: float) -> None:
        """Begin an exchange that may take so long.

        Raises:
            TimeoutError: No time at all.
        """
        self._deadline = time.monotonic() + timeout_s
        if timeout_s != self._armed_s:
            self._arm(timeout_s)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
        self._drop_descriptors()

    def send(self, method: str, path: str, content_type: str, body: Sequence[Blob]) -> None:
        """Send a request; large bodies are not copied.

        Raises:
            OSError: The connection broke, or ``TimeoutError``.
        """
        length = sum(map(len, body))
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: sandbox\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n"
        ).encode("ascii")
        self._send_pieces([head, *body])

    def receive(self, *, max_bytes: int) -> tuple[int, str, bool, memoryview]:
        """Return the reply's status, content type, whether the connection may be used again, and its body.

        Raises:
            BadReply: Not HTTP, no length, or a body of more than ``max_bytes``.
            ConnectionEnded: The other side closed it.
            OSError: The connection broke, or ``TimeoutError``.
        """
        head, rest = self._head()
        status, fields = _parse_head(head)
        length = fields.get("content-length", "")
        if not (length.isascii() and length.isdigit()) or "transfer-encoding" in fields:
            raise BadReply("a reply without Content-Length")
        if int(length) > max_bytes:
            raise BadReply(f"a reply of {int(length)} bytes where at most {max_bytes} are taken")
        body = self._body(rest, int(length))
        return status, fields.get("content-type", ""), fields.get("connection", "").lower() != "close", body

    def upgrade(self, path: str, protocol: str) -> bool:
        """Ask to speak another protocol from here on; tell whether the other side agreed.

        Raises:
            BadReply, ConnectionEnded, OSError: As for ``receive``.
        """
        request = f"GET {path} HTTP/1.1\r\nHost: sandbox\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n"
        self._send_pieces([request.encode("ascii")])
        head, rest = self._head()
        status, _ = _parse_head(head)
        agreed = status == _SWITCHING_PROTOCOLS and not rest
        if agreed and protocol == FILES_UPGRADE:
            self._frames, self._takes_files = FrameAssembler(files=True), True
        return agreed

    def send_frame(self, pieces: Sequence[Blob], fd: int | None = None) -> None:
        """Send a frame; large blobs are not copied.

        Args:
            pieces: The frame.
            fd: A descriptor that goes with it; ours stays open.

        Raises:
            OSError: The connection broke, or ``TimeoutError``.
        """
        if fd is not None:
            try:
                sent = self._connection.sendmsg([pieces[0]], rights([fd]))
            except BlockingIOError:
                raise TimeoutError("the request was not taken in time") from None
            pieces = [memoryview(pieces[0])[sent:], *pieces[1:]]
        self._send_pieces(pieces)

    def send_at_once(self, frame: bytes) -> bool:
        """Send a frame, if the kernel takes it now; from any thread, where ``send_frame`` is not used meanwhile.

        A part of a frame that was sent makes the connection useless: it is shut down.
        """
        with contextlib.suppress(OSError):
            sent = self._connection.send(frame, socket.MSG_DONTWAIT)
            if sent == len(frame):
                return True
            self._connection.shutdown(socket.SHUT_RDWR)
        return False

    def receive_frame(self, *, max_bytes: int) -> tuple[dict[str, Any], list[memoryview]]:
        """Return the next frame.

        Raises:
            FrameError: Not a frame, or one of more than ``max_bytes``.
            FileLost: Its blobs are in a file whose descriptor did not get here.
            ConnectionEnded: The other side closed it.
            OSError: The connection broke, or ``TimeoutError``.
        """
        assembler = self._frames
        assembler.max_bytes = max_bytes
        while (frame := assembler.next()) is None:
            received = self._receive(max(_RECEIVE_BYTES, min(assembler.missing, 1 << 20)))
            if not received:
                raise ConnectionEnded(clean=not assembler.started)
            assembler.add(received)
        if assembler.in_file:
            return frame[0], self._mapped(frame[0], max_bytes)
        if self._fds and not assembler.started:  # else it may be that of the next frame
            self._drop_descriptors()
        return frame

    def receive_descriptor(self) -> tuple[dict[str, Any], int | None]:
        """Return the header of the next frame, and the descriptor that came with it, owned by the caller, or None.

        Raises:
            FrameError, ConnectionEnded, OSError: As for ``receive_frame``.
        """
        try:
            received, fds, _, _ = socket.recv_fds(self._connection, _RECEIVE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise TimeoutError("no answer in time") from None
        try:
            if not received:
                raise ConnectionEnded(clean=True)
            self._frames.add(received)
            header, _ = self.receive_frame(max_bytes=_RECEIVE_BYTES)
            self.check_end()
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return header, fds[0] if fds else None

    @property
    def has_more(self) -> bool:
        """Whether bytes of a further frame are held."""
        return self._frames.started

    def fileno(self) -> int:
        """Return the connection's descriptor."""
        return self._connection.fileno()

    def check_end(self) -> None:
        """Check that nothing came after the last frame.

        Raises:
            BadReply: Something did.
        """
        if self._frames.started:
            raise BadReply("bytes after the reply")

    def _mapped(self, header: dict[str, Any], max_bytes: int) -> list[memoryview]:
        """Return the blobs of a file; generated code may have made it."""
        lengths = list(blob_lengths(header, max_bytes=max_bytes))
        # One read may have brought the beginning of the next frame, with the descriptor of that.
        fds, self._fds = self._fds[:1], self._fds[1:]
        if not fds:
            raise FileLost("the descriptor of a reply got lost")
        file = BlobFile.received(fds, lengths)
        try:
            return file.views()
        finally:
            file.close()

    def _drop_descriptors(self) -> None:
        close_all(self._fds)
        self._fds = []

    def _arm(self, left_s: float) -> None:
        if left_s <= 0:
            raise TimeoutError("no answer in time")
        timeval = _TIMEVAL.pack(int(left_s), int(left_s % 1 * 1e6) or 1)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._armed_s = left_s

    def _receive(self, size: int) -> bytes:
        try:
            if self._takes_files:
                received, ancillary, _, _ = self._connection.recvmsg(size, ANCILLARY_BYTES, _CLOEXEC)
                if ancillary:
                    self._fds += descriptors(ancillary)
            else:
                received = self._connection.recv(size)
        except BlockingIOError:
            raise TimeoutError("no answer in time") from None
        if self._deadline - time.monotonic() < self._armed_s - _ARMED_ANEW_S:
            self._arm(self._deadline - time.monotonic())
        return received

    def _send_pieces(self, pieces: Sequence[Blob]) -> None:
        if sum(map(len, pieces)) <= _JOIN_BYTES:
            pieces = [b"".join(pieces)]
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view:
                try:
                    view = view[self._connection.send(view[:_SEND_BYTES]) :]
                except BlockingIOError:
                    raise TimeoutError("the request was not taken in time") from None
                if view and self._deadline - time.monotonic() < self._armed_s - _ARMED_ANEW_S:
                    self._arm(self._deadline - time.monotonic())

    def _head(self) -> tuple[bytes, bytes]:
        buffer = b""
        while _END_OF_HEAD not in buffer:
            if len(buffer) > _MAX_HEAD_BYTES:
                raise BadReply("a head without end")
            received = self._receive(_RECEIVE_BYTES)
            if not received:
                raise ConnectionEnded(clean=not buffer)
            buffer = buffer + received if buffer else received
        head, _, rest = buffer.partition(_END_OF_HEAD)
        return head, rest

    def _body(self, start: bytes, length: int) -> memoryview:
        if len(start) >= length:
            if len(start) > length:
                raise BadReply("bytes after the reply")
            return memoryview(start)
        body = bytearray(start)  # grows with what arrives: an announced length is no reason to take memory
        while len(body) < length:
            received = self._receive(min(length - len(body), 1 << 20))
            if not received:
                raise ConnectionEnded(clean=False)
            body += received
        return memoryview(body)


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    lines = head.decode("latin-1").split("\r\n")
    version, _, rest = lines[0].partition(" ")
    status = rest[:3]
    if version not in ("HTTP/1.1", "HTTP/1.0") or not (status.isascii() and status.isdigit()):
        raise BadReply(f"not a reply: {lines[0][:80]!r}")
    fields = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        fields[name.lower()] = value.strip()
    return int(status), fields
