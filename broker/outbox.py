"""Sending on a non-blocking socket without waiting: at once what the kernel takes, the rest when it takes more."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import gevent

from broker.protocol.frames import Blob

#: The kernel takes at most 1,024 pieces at once.
_MOST_PIECES = 512
#: Up to this size pieces are joined: one piece is sent faster than several.
_JOIN_BYTES = 64 << 10
_WRITABLE = 2


class Outbox:
    """Sends messages, in order.

    Args:
        sock: A non-blocking socket; closed by its owner, after ``close``.
        on_empty: Called when everything has left of a message that did not leave at once.
        on_broken: Called once when the other side is gone while a message waits.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_empty: Callable[[], None] = lambda: None,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        self._sock, self._on_empty, self._on_broken = sock, on_empty, on_broken
        self._left: list[Blob] = []
        self._watcher = gevent.get_hub().loop.io(sock.fileno(), _WRITABLE)

    @property
    def full(self) -> bool:
        """Whether a part of a message still waits."""
        return bool(self._left)

    def send(self, pieces: Sequence[Blob], ancillary: Sequence[tuple[int, int, bytes]] = ()) -> int:
        """Send a message; return how many bytes left at once.

        Args:
            pieces: Its parts, not changed before they have left.
            ancillary: Goes with the first byte, and is lost if not one byte leaves now.

        Raises:
            OSError: The other side is gone.
        """
        if len(pieces) > 1 and sum(map(len, pieces)) <= _JOIN_BYTES:
            pieces = (b"".join(pieces),)
        if self._left:
            self._left.extend(pieces)
            return 0
        try:
            if ancillary or len(pieces) > 1:
                pieces = [piece for piece in pieces if len(piece)]
                sent = self._sock.sendmsg(pieces[:_MOST_PIECES], ancillary)
            else:
                sent = self._sock.send(pieces[0])
        except BlockingIOError:
            sent = 0
        if len(pieces) == 1 and sent == len(pieces[0]):
            return sent
        self._left = _without(pieces, sent)
        if self._left:
            self._watcher.start(self._go_on)
        return sent

    def close(self) -> None:
        """Send nothing more. Idempotent."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None
        self._left = []

    def _go_on(self) -> None:
        try:
            self._left = _without(self._left, self._sock.sendmsg(self._left[:_MOST_PIECES]))
        except BlockingIOError:
            return
        except OSError:
            self._watcher.stop()
            self._on_broken()
            return
        if not self._left:
            self._watcher.stop()
            self._on_empty()


def _without(pieces: Sequence[Blob], sent: int) -> list[Blob]:
    """Return what is left of ``pieces`` after the first ``sent`` bytes."""
    for i, piece in enumerate(pieces):
        if sent < len(piece):
            return [memoryview(piece)[sent:], *pieces[i + 1 :]]
        sent -= len(piece)
    return []
