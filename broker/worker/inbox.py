"""What the worker is told, on two ways: the broker's channel, and the lane, which comes straight from the host.

The broker knows of every execution, also of one that comes on the lane, and sends it again on the channel where it is
not over in a moment. So whatever comes second is thrown away, by its execution's id. See
``docs/decisions/021-the-lane.md``.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from broker.protocol import frames
from broker.protocol.blob_file import as_bytes
from broker.protocol.frames import Blob
from broker.protocol.spinner import Spinner
from broker.worker.channel import Channel

#: One execution runs at a time, so that at most the last few can come once more.
_REMEMBERED = 64
#: Written to wake somebody: into a bell, which is a pipe, or an eventfd, which takes no less.
ONE = (1).to_bytes(8, sys.byteorder)
#: Above this a result is the broker's to bring: the host reads the lane while it holds nothing else up.
_MOST_REPLY_BYTES = 64 << 10
#: The broker is rung for when so much may lie in one of the sockets' buffers, which hold about 200 KB: who finds one
#: full waits.
_MOST_UNREAD_BYTES = 96 << 10


class Message(NamedTuple):
    """One frame.

    Attributes:
        header: Its header.
        blobs: Its blobs.
        fd: The descriptor that came with it, owned by the receiver, or None.
        on_lane: Whether it came from the host.
    """

    header: dict[str, Any]
    blobs: list[Blob]
    fd: int | None
    on_lane: bool


class Inbox:
    """Reads the channel, and the lane while there is one.

    Args:
        channel: The broker's.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lane: Channel | None = None
        self._bell: int | None = None
        self._poll = select.poll()
        self._spinner = Spinner()
        self._seen: deque[str] = deque(maxlen=_REMEMBERED)
        # Of the channel what was sent, of the lane what was received (the broker was sent about the same), when the
        # bell was rung last.
        self._rung_at = 0, 0
        # What the broker has said while code ran, other than what is thrown away.
        self._kept: deque[Message] = deque()

    def receive(self, *, takes_lane: bool) -> Message:
        """Wait for the next frame that asks for something new.

        Args:
            takes_lane: Whether an execution may come on the lane now; else it is left to the broker.

        Raises:
            EOFError: The broker closed the channel.
        """
        while True:
            message = self._kept.popleft() if self._kept else self._next()
            if self._is_wanted(message, takes_lane):
                if self._lane is not None and message.header["type"] == "execute":
                    self._seen.append(message.header["execution_id"])
                return message

    @property
    def lane(self) -> Channel | None:
        """The lane, while there is one."""
        return self._lane

    def tell_broker(self, frame: bytes) -> bool:
        """Send a small frame as a whole; tell whether it was sent."""
        sent = self._channel.send_whole(frame)
        self.ring_if_much()
        return sent

    def skim(self) -> None:
        """Read what the broker says while code runs, and keep what asks for something new.

        An interrupt waits meanwhile: a frame read by halves would be the end of the session.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        try:
            while True:
                message = Message(*self._channel.receive(), on_lane=False)
                if self._is_wanted(message, takes_lane=False):
                    self._kept.append(message)
                if not self._channel.has_more:
                    return
        except (EOFError, ConnectionError):
            self._close_lane()  # who waits asks the broker, and finds that it is gone
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def drop_lane(self) -> None:
        """Go on without a lane: the host's end is closed, or what came is no frame."""
        self._close_lane()

    def fileno(self) -> int:
        """Return the channel's descriptor."""
        return self._channel.fileno()

    def lane_frame(self, header: dict[str, Any], blobs: Sequence[Blob | str]) -> bytes | None:
        """Return the frame that tells the host a result on the lane, or None where it is the broker's to bring."""
        if self._lane is None or sum(map(len, blobs)) > _MOST_REPLY_BYTES:
            return None
        frame = b"".join(frames.dump_frame(header, as_bytes(blobs)))
        return frame if len(frame) <= _MOST_REPLY_BYTES else None

    def send_on_lane(self, frame: bytes) -> None:
        """Tell the host; where that does not work, it sees the end of the lane and asks the broker."""
        if self._lane is not None:
            self._lane.send_now(frame)
            self.ring_if_much()

    def ring(self) -> None:
        """Wake the broker: while the lane is in use, it does not look at each frame as it comes."""
        if self._bell is not None:
            self._rung_at = self._loads()
            with contextlib.suppress(OSError):
                os.write(self._bell, ONE)

    def ring_if_much(self) -> None:
        """Wake the broker where much may lie unread that it was told, by us or by the host."""
        (sent, received), (rung_sent, rung_received) = self._loads(), self._rung_at
        if max(sent - rung_sent, received - rung_received) > _MOST_UNREAD_BYTES:
            self.ring()

    def _loads(self) -> tuple[int, int]:
        return self._channel.sent, 0 if self._lane is None else self._lane.received

    def close(self) -> None:
        """Close both ends here."""
        self._channel.close()
        self._close_lane()
        self._replace_bell(None)

    def descriptors(self) -> tuple[int, ...]:
        """Return what is open, for a copy of this process that must not keep it."""
        lane = () if self._lane is None else (self._lane.fileno(),)
        return (self._channel.fileno(), *lane, *(() if self._bell is None else (self._bell,)))

    def _is_wanted(self, message: Message, takes_lane: bool) -> bool:
        """Tell whether a message asks for something new; what else it brings is seen to, or thrown away."""
        kind = message.header["type"]
        if kind == "lane" and not message.on_lane:
            self._open_lane(message.fd, message.header.get("bell"))
            return False
        if kind == "execute":
            wanted = (takes_lane or not message.on_lane) and message.header["execution_id"] not in self._seen
        else:
            wanted = not message.on_lane  # else an answer that came too late
        if not wanted and message.fd is not None:
            os.close(message.fd)
        return wanted

    def _next(self) -> Message:
        if self._lane is None or self._channel.has_more:
            return Message(*self._channel.receive(), on_lane=False)
        # Always the channel first: the broker may end the lane, and what is left in there must not run then.
        if self._channel.fileno() in self._spinner.wait(self._poll, 0 if self._lane.has_more else None):
            return Message(*self._channel.receive(), on_lane=False)
        try:
            header, blobs, fd = self._lane.receive()
        except (EOFError, OSError, frames.FrameError):
            self._close_lane()
            return self._next()
        return Message(header, blobs, fd, on_lane=True)

    def _open_lane(self, fd: int | None, bell: int | None) -> None:
        self._close_lane()  # what is left unread in there the broker sends again
        self._replace_bell(bell)
        if fd is not None:
            self._lane = Channel(socket.socket(fileno=fd))
            for each in (self._channel, self._lane):
                self._poll.register(each.fileno(), select.POLLIN)
            self._rung_at = self._loads()

    def _close_lane(self) -> None:
        if self._lane is not None:
            self._poll.unregister(self._lane.fileno())
            self._lane.close()
            self._lane = None

    def _replace_bell(self, bell: int | None) -> None:
        if self._bell is not None:
            with contextlib.suppress(OSError):  # code has closed it: the next lane brings another one
                os.close(self._bell)
        self._bell = bell
