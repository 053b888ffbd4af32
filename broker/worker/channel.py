"""Frames over the socket pair between broker and worker.

The first byte of an ``execute`` frame may carry descriptors (SCM_RIGHTS): both ends of the pipe for that execution's
output, and the file with its blobs.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence
from typing import Any

from broker.protocol import frames, limits
from broker.protocol.blob_file import BlobFile, as_bytes, descriptors, rights
from broker.protocol.frames import Blob

# One read fetches a whole ordinary frame.
_READ_BYTES = 64 << 10
_ANCILLARY_BYTES = socket.CMSG_SPACE(12)  # three descriptors
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
# What a frame takes of a socket's buffer beside its bytes, about.
_FRAME_COSTS = 1 << 10
# Pieces up to this are joined into one write; larger ones are not worth the copy.
_JOIN_BYTES = 64 << 10


class FrameTooLarge(ValueError):
    """The broker would refuse the frame and end the session."""


class Channel:
    """The worker's end of a socket pair: one thread reads, any thread sends.

    Attributes:
        received: How much of the socket's buffer all frames together took that were received, in bytes.
        sent: The same of those that were sent.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._buffer = b""
        self._fds: list[int] = []
        # Threads tell of their tool calls while the main thread tells a result.
        self._sending = threading.Lock()
        self.received = self.sent = 0

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def receive(self) -> tuple[dict[str, Any], list[Blob], int | None]:
        """Wait for a frame.

        Returns:
            Header, blobs, and the descriptor that came with it (owned by the caller) or None.

        Raises:
            EOFError: The broker closed the channel.
            FrameError: What came is no frame.
        """
        header, blobs = frames.read_frame(self._read_exactly)
        self.received += _FRAME_COSTS
        # By what the header says: one read may have brought the descriptor of the next frame too.
        fd = self._fds.pop(0) if self._fds and _brings_descriptor(header) else None
        for name in ("bell", "reader"):
            if header.get(name) is True:
                header[name] = self._fds.pop(0) if self._fds else None
        if header.get("file") is True:
            file = BlobFile(self._fds.pop(0), header["blobs"])
            blobs = list(file.views())
            file.close()
        return header, blobs, fd

    @property
    def has_more(self) -> bool:
        """Whether bytes were read ahead."""
        return bool(self._buffer)

    def send_now(self, frame: bytes) -> bool:
        """Send a frame if all of it leaves at once. Where it does not, the connection is of no more use."""
        with contextlib.suppress(OSError), self._sending:
            self._count(len(frame))
            if self._sock.send(frame, socket.MSG_DONTWAIT) == len(frame):
                return True
        self.end()
        return False

    def send_whole(self, frame: bytes) -> bool:
        """Send a frame that the kernel takes as one piece, or nothing at all; tell whether it was sent."""
        with contextlib.suppress(OSError), self._sending:
            self._count(len(frame))
            return self._sock.send(frame) == len(frame)
        return False

    def end(self) -> None:
        """Let nothing more through, in either direction; what was read ahead is forgotten."""
        self._buffer = b""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def send(self, header: dict[str, Any], blobs: Sequence[Blob | str] = ()) -> None:
        """Send one frame, large blobs in a file where one can be had.

        Args:
            header: JSON object.
            blobs: What it refers to; ASCII texts as they are.

        Raises:
            FrameTooLarge: Larger than the broker reads, or of too many parts; nothing was sent.
            OSError: The broker is gone.
        """
        if not blobs:
            self._send(frames.dump_frame(header))
            return
        blobs_size = sum(map(len, blobs))
        file = BlobFile.worth(blobs) if blobs_size <= limits.MAX_TOOL_CALL_BYTES else None
        if file is None:
            self._send(frames.dump_frame(header, as_bytes(blobs)))
            return
        try:
            self._send(frames.dump_frame({**header, "file": True, "blobs": file.lengths}), file)
        finally:
            file.close()

    def close(self) -> None:
        """Close this end: a forked child must not keep the channel open."""
        self._sock.close()

    def _send(self, pieces: Sequence[Blob], file: BlobFile | None = None) -> None:
        size = sum(map(len, pieces)) + (0 if file is None else file.size)
        if size > limits.MAX_TOOL_CALL_BYTES or len(pieces[0]) > limits.MAX_HEADER_BYTES:
            raise FrameTooLarge(f"a frame of {size:,} bytes")
        if frames.containers(bytes(pieces[0])) > limits.MAX_JSON_CONTAINERS:
            raise FrameTooLarge(f"a frame of more than {limits.MAX_JSON_CONTAINERS:,} lists and dicts")
        with self._sending:
            self._count(sum(map(len, pieces)))
            if file is not None:
                sent = self._sock.sendmsg(pieces, rights([file.fd]))
                pieces = [memoryview(pieces[0])[sent:]]
            elif len(pieces) > 1 and size <= _JOIN_BYTES:
                pieces = [b"".join(pieces)]
            for piece in pieces:
                self._sock.sendall(piece)

    def _count(self, size: int) -> None:
        self.sent += size + _FRAME_COSTS

    def _read_exactly(self, size: int) -> Blob:
        if len(self._buffer) >= size:
            piece, self._buffer = self._buffer[:size], self._buffer[size:]
            return piece
        if size > _READ_BYTES:
            return self._read_large(size)
        while len(self._buffer) < size:
            self._buffer += self._read_some()
        return self._read_exactly(size)

    def _read_some(self) -> bytes:
        data, ancillary, _, _ = self._sock.recvmsg(_READ_BYTES, _ANCILLARY_BYTES, _CLOEXEC)
        if ancillary:
            self._fds += descriptors(ancillary)
        if not data:
            raise EOFError("the broker closed the channel")
        self.received += len(data)
        return data

    def _read_large(self, size: int) -> bytearray:
        """Read without passing through the buffer; no descriptor can come here, inside a frame."""
        piece = bytearray(size)
        filled = len(self._buffer)
        piece[:filled] = self._buffer
        self._buffer = b""
        view = memoryview(piece)
        while filled < size:
            count = self._sock.recv_into(view[filled:])
            if count == 0:
                raise EOFError("the broker closed the channel")
            filled += count
        return piece


def _brings_descriptor(header: dict[str, Any]) -> bool:
    """Tell whether a frame comes with a descriptor of its own, beside that of its blobs."""
    kind = header.get("type")
    return (kind == "execute" and header.get("pipe") != "kept") or kind == "fork" or header.get("fd") is True
