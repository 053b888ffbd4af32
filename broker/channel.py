"""The broker's end of a worker's channel: frames both ways over a non-blocking socket."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Any

import gevent

from broker.lull import manners
from broker.outbox import Outbox
from broker.protocol import frames, limits
from broker.protocol.blob_file import ANCILLARY_BYTES, BlobFile, Blobs, as_views, close_all, descriptors, rights
from broker.protocol.frames import FrameAssembler, FrameError
from broker.protocol.messages import ErrorInfo, Outcome

JsonObject = dict[str, Any]

#: What a worker may send in one frame. Its values are bounded like a tool call's.
MAX_WORKER_FRAME_BYTES = limits.MAX_TOOL_CALL_BYTES

_FILE_LOST = ErrorInfo(
    type="OSError",
    message="the code ran, but its large result was lost: the sandbox is out of descriptors; ask for it once more",
).to_json()

_SMALL_READ_BYTES = 64 << 10
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
#: Read in one turn of the event loop; more is left to the next turn, so that one worker starves nobody.
_MOST_READ_BYTES = 4 << 20


class Channel:
    """A worker's channel.

    Args:
        sock: Our end.
        on_frame: Called with each frame; a file that it does not take over (``BlobFile.moved``) is closed afterwards.
        on_broken: Called once when bytes arrive that are no frame.
        on_closed: Called once at the end of the stream.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_frame: Callable[[JsonObject, Blobs], None],
        on_broken: Callable[[], None],
        on_closed: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reading = self._over = False
        self._on_frame, self._on_broken, self._on_closed = on_frame, on_broken, on_closed
        self._frames = FrameAssembler(MAX_WORKER_FRAME_BYTES, files=True)
        self._fds: list[int] = []
        self._outbox = Outbox(sock)
        self._watcher = gevent.get_hub().loop.io(sock.fileno(), 1)
        self._watcher.start(self._readable)

    def send(self, header: JsonObject, blobs: Blobs = (), *, fds: Sequence[int] = ()) -> None:
        """Send a frame, with descriptors and that of the blobs' file. What the kernel does not take now follows later.

        One frame at a time: the worker must have answered the one before.
        """
        if self._outbox.full:
            self._on_broken()  # it reported a result before it had read the whole request
            return
        if isinstance(blobs, BlobFile) and blobs.fd >= 0:
            header, fds = {**header, "file": True, "blobs": blobs.lengths}, [*fds, blobs.fd]
            blobs = ()
        blobs = as_views(blobs)
        try:
            sent = self._outbox.send(frames.dump_frame(header, blobs), rights(fds) if fds else ())
        except OSError:
            return  # the end of the stream is seen by the reader
        if not sent:
            self._on_broken()  # full, so it never read what it has answered

    @property
    def frame_size(self) -> int:
        """Bytes of the frame that was received last."""
        return self._frames.size

    @property
    def full(self) -> bool:
        """Whether a part of a frame still waits."""
        return self._outbox.full

    def tell(self, header: JsonObject) -> None:
        """Send a frame that may come between others, unless one is under way: then the worker reads that one first."""
        if self._sock.fileno() >= 0 and not self._outbox.full:
            with contextlib.suppress(OSError):
                self._outbox.send(frames.dump_frame(header))

    def close(self) -> None:
        """Close the channel. Idempotent."""
        if self._sock.fileno() < 0:
            return
        self._over = True
        self._watcher.stop()
        self._watcher.close()
        self._outbox.close()
        self._sock.close()
        close_all(self._fds)
        self._fds = []

    def attend(self, wanted: bool) -> None:
        """See ``lull.Line.attend``."""
        if self._over:
            return
        if wanted:
            self._watcher.start(self._readable)
        else:
            self._watcher.stop()

    def read_now(self) -> bool:
        """Take in what has arrived, and tell whether that was anything; does nothing within ``on_frame``."""
        return not self._over and not self._reading and self._readable()

    def _readable(self) -> bool:
        self._reading = True
        try:
            return self._read()
        finally:
            self._reading = False

    def _read(self) -> bool:
        left = _MOST_READ_BYTES
        while left > 0 and self._sock.fileno() >= 0:
            wanted = min(max(self._frames.missing, _SMALL_READ_BYTES), left)
            try:
                data, ancillary, _, _ = self._sock.recvmsg(wanted, ANCILLARY_BYTES, _CLOEXEC)
            except BlockingIOError:
                break
            except OSError:
                data, ancillary = b"", []
            if ancillary:
                self._fds += descriptors(ancillary)
            if not data:
                self._stop()
                self._on_closed()
                break
            left -= len(data)
            self._take(data)
            if len(data) < wanted:
                break
        return left < _MOST_READ_BYTES

    def _stop(self) -> None:
        """Read nothing any more."""
        self._over = True
        self._watcher.stop()

    def _take(self, data: bytes) -> None:
        self._frames.add(data)
        try:
            frame = self._frames.next()
            while frame is not None and self._sock.fileno() >= 0:
                if self._frames.in_file:
                    self._take_with_file(*frame)
                else:
                    self._on_frame(*frame)
                manners.give_way()
                frame = self._frames.next()
            if self._fds and (len(self._fds) > 1 or not self._frames.started):
                raise FrameError("descriptors that no frame has announced")
        except FrameError:
            self._stop()
            self._on_broken()

    def _take_with_file(self, header: JsonObject, _: object) -> None:
        lengths = list(frames.blob_lengths(header, max_bytes=MAX_WORKER_FRAME_BYTES))
        fds, self._fds = self._fds, []
        if not fds:  # we are out of descriptors, or it never sent one
            self._on_frame({**header, "outcome": Outcome.RAISED.value, "value": None, "error": _FILE_LOST}, ())
            return
        file = BlobFile.received(fds, lengths)
        try:
            self._on_frame(header, file)
        finally:
            file.close()
