"""The broker's end of a worker's channel: frames both ways over a non-blocking socket."""

from __future__ import annotations

import array
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Any

import gevent
import gevent.socket

from broker.protocol import frames, limits
from broker.protocol.frames import Blob, FrameAssembler, FrameError

JsonObject = dict[str, Any]

#: What a worker may send in one frame. Its values are bounded like a tool call's.
MAX_WORKER_FRAME_BYTES = limits.MAX_TOOL_CALL_BYTES

_SMALL_READ_BYTES = 64 << 10
#: Read in one turn of the event loop; more is left to the next turn, so that one worker starves nobody.
_MOST_READ_BYTES = 4 << 20
#: The kernel takes at most 1,024 pieces at once.
_MOST_PIECES = 512


class Channel:
    """A worker's channel.

    Args:
        sock: Our end.
        on_frame: Called with each frame.
        on_broken: Called once when bytes arrive that are no frame.
        on_closed: Called once at the end of the stream.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_frame: Callable[[JsonObject, Sequence[Blob]], None],
        on_broken: Callable[[], None],
        on_closed: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_frame, self._on_broken, self._on_closed = on_frame, on_broken, on_closed
        self._frames = FrameAssembler(MAX_WORKER_FRAME_BYTES)
        self._writer: gevent.Greenlet | None = None
        self._watcher = gevent.get_hub().loop.io(sock.fileno(), 1)
        self._watcher.start(self._readable)

    def send(self, header: JsonObject, blobs: Sequence[Blob] = (), *, fd: int | None = None) -> None:
        """Send a frame, a file descriptor on its first byte if given. What the kernel does not take now follows later.

        One frame at a time: the worker must have answered the one before.
        """
        if self._writer is not None and not self._writer.dead:
            self._on_broken()  # it reported a result before it had read the whole request
            return
        pieces = [piece for piece in frames.dump_frame(header, blobs) if len(piece)]
        try:
            rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            sent = self._sock.sendmsg(pieces[:_MOST_PIECES], rights)
        except BlockingIOError:
            self._on_broken()  # full, so it never read what it has answered
            return
        except OSError:
            return  # the end of the stream is seen by the reader
        rest = _without(pieces, sent)
        if rest:
            self._writer = gevent.spawn(self._send_rest, rest)

    def close(self) -> None:
        """Close the channel. Idempotent."""
        if self._sock.fileno() < 0:
            return
        self._watcher.stop()
        self._watcher.close()  # from here on it is not active
        if self._writer is not None:
            self._writer.kill(block=False)
        self._sock.close()

    def _send_rest(self, pieces: list[Blob]) -> None:
        with contextlib.suppress(OSError):
            while pieces:
                gevent.socket.wait_write(self._sock.fileno())
                pieces = _without(pieces, self._sock.sendmsg(pieces[:_MOST_PIECES]))

    def read_now(self) -> None:
        """Take in what has arrived."""
        if self._watcher.active:
            self._readable()

    def _readable(self) -> None:
        left = _MOST_READ_BYTES
        while left > 0 and self._sock.fileno() >= 0:
            wanted = min(max(self._frames.missing, _SMALL_READ_BYTES), left)
            try:
                data = self._sock.recv(wanted)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._watcher.stop()
                self._on_closed()
                return
            left -= len(data)
            self._take(data)
            if len(data) < wanted:
                return

    def _take(self, data: bytes) -> None:
        self._frames.add(data)
        try:
            frame = self._frames.next()
            while frame is not None and self._sock.fileno() >= 0:
                self._on_frame(*frame)
                frame = self._frames.next()
        except FrameError:
            self._watcher.stop()
            self._on_broken()


def _without(pieces: Sequence[Blob], sent: int) -> list[Blob]:
    """Return what is left of ``pieces`` after the first ``sent`` bytes."""
    for i, piece in enumerate(pieces):
        if sent < len(piece):
            return [memoryview(piece)[sent:], *pieces[i + 1 :]]
        sent -= len(piece)
    return []
