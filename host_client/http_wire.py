"""One HTTP/1.1 exchange on a connected socket, as far as our broker needs it; why not a library: decision 002.

The reply counts as hostile: its head and its body are bounded, and the whole exchange has one deadline.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

from broker.protocol.frames import Blob, FrameAssembler

#: Our broker's heads have some 150 bytes.
_MAX_HEAD_BYTES = 16 << 10
_RECEIVE_BYTES = 64 << 10
#: Bodies up to here are joined to the head: one packet, one wake-up at the other end.
_JOIN_BYTES = 64 << 10
#: What one call of sendmsg is given at most, so that the deadline is looked at now and then.
_SEND_BYTES = 4 << 20
_END_OF_HEAD = b"\r\n\r\n"
_SWITCHING_PROTOCOLS = 101


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


class Exchange:
    """Sends one request and reads its reply.

    Args:
        connection: Connected, idle.
        timeout_s: For the whole exchange.
    """

    def __init__(self, connection: socket.socket, *, timeout_s: float) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + timeout_s

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
        if length <= _JOIN_BYTES:
            self._arm()
            self._connection.sendall(b"".join((head, *body)))
        else:
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
        self._arm()
        request = f"GET {path} HTTP/1.1\r\nHost: sandbox\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n"
        self._connection.sendall(request.encode("ascii"))
        head, rest = self._head()
        status, _ = _parse_head(head)
        return status == _SWITCHING_PROTOCOLS and not rest

    def send_frame(self, pieces: Sequence[Blob]) -> None:
        """Send a frame; large blobs are not copied.

        Raises:
            OSError: The connection broke, or ``TimeoutError``.
        """
        if sum(map(len, pieces)) <= _JOIN_BYTES:
            self._arm()
            self._connection.sendall(b"".join(pieces))
        else:
            self._send_pieces(pieces)

    def receive_frame(self, *, max_bytes: int) -> tuple[dict[str, Any], list[memoryview]]:
        """Return the next frame.

        Raises:
            FrameError: Not a frame, or one of more than ``max_bytes``.
            BadReply: More than one frame.
            ConnectionEnded: The other side closed it.
            OSError: The connection broke, or ``TimeoutError``.
        """
        assembler = FrameAssembler(max_bytes)
        while True:
            self._arm()
            received = self._connection.recv(max(_RECEIVE_BYTES, min(assembler.missing, 1 << 20)))
            if not received:
                raise ConnectionEnded(clean=not assembler.started)
            assembler.add(received)
            frame = assembler.next()
            if frame is not None:
                if assembler.started:
                    raise BadReply("bytes after the reply")
                return frame

    def _arm(self) -> None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no answer in time")
        self._connection.settimeout(left_s)

    def _send_pieces(self, pieces: Sequence[Blob]) -> None:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view:
                self._arm()
                view = view[self._connection.send(view[:_SEND_BYTES]) :]

    def _head(self) -> tuple[bytes, bytes]:
        buffer = b""
        while _END_OF_HEAD not in buffer:
            if len(buffer) > _MAX_HEAD_BYTES:
                raise BadReply("a head without end")
            self._arm()
            received = self._connection.recv(_RECEIVE_BYTES)
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
            self._arm()
            received = self._connection.recv(min(length - len(body), 1 << 20))
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
