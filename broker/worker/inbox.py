"""What the worker is told, on two ways: the broker's channel, and the lane, which comes straight from the host.

The broker knows of every execution, also of one that comes on the lane, and sends it again on the channel where it is
not over in a moment. So whatever comes second is thrown away, by its execution's id. See
``docs/decisions/021-the-lane.md``.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from broker.protocol import frames, limits
from broker.protocol.blob_file import as_bytes
from broker.protocol.frames import Blob
from broker.worker.channel import Channel

#: One execution runs at a time, so that at most the last few can come once more.
_REMEMBERED = 64
#: Above this a result is the broker's to bring: the host reads the lane while it holds nothing else up.
_MOST_REPLY_BYTES = 64 << 10


class Unanswered(enum.Enum):
    """Why a tool call has no answer on the lane: what its caller asks the broker then."""

    NOT_TOLD = "nobody knows of it"
    HOST_NOT_TOLD = "the broker knows of it, but the host may not"
    LATE = "both know of it; the answer comes from the broker"


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
        self._seen: deque[str] = deque(maxlen=_REMEMBERED)
        self._asking = self._reading = False

    def receive(self, *, takes_lane: bool) -> Message:
        """Wait for the next frame that asks for something new.

        Args:
            takes_lane: Whether an execution may come on the lane now; else it is left to the broker.

        Raises:
            EOFError: The broker closed the channel.
        """
        if self._reading and self._lane is not None:
            self._lane.end()  # a second interrupt struck before ``ask`` could do it
        self._asking = self._reading = False
        while True:
            message = self._next()
            kind = message.header["type"]
            if kind == "lane" and not message.on_lane:
                self._open_lane(message.fd, message.header.get("bell"))
            elif kind != "execute" and not message.on_lane:
                return message
            elif kind == "execute" and self._is_new(message) and (takes_lane or not message.on_lane):
                if self._lane is not None:
                    self._seen.append(message.header["execution_id"])
                return message
            elif message.fd is not None:  # also of an answer that came too late
                os.close(message.fd)

    def ask(self, frame: bytes, key: str) -> dict[str, Any] | Unanswered:
        """Tell broker and host of a tool call, and wait a moment for the host's answer.

        Runs where an interrupt may strike at any instruction: then nothing is torn but the lane, which ends.

        Args:
            frame: At most ``limits.MAX_LANE_BYTES``, which leave as a whole or not at all.
            key: The call's.

        Returns:
            The answer's header, or why there is none here.
        """
        lane = self._lane
        if lane is None or self._asking or self._is_called() or not self._channel.send_whole(frame):
            return Unanswered.NOT_TOLD
        self._asking = True
        try:
            if not lane.send_now(frame):
                return Unanswered.HOST_NOT_TOLD
            return self._answer(lane, key)
        except BaseException:
            if self._reading:
                lane.end()  # a part of an answer may be lost
            raise
        finally:
            self._asking = self._reading = False

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

    def ring(self) -> None:
        """Wake the broker: while the lane is in use, it does not look at each frame as it comes."""
        if self._bell is not None:
            with contextlib.suppress(OSError):
                os.write(self._bell, b"\0")

    def close(self) -> None:
        """Close both ends here."""
        self._channel.close()
        self._close_lane()
        self._replace_bell(None)

    def descriptors(self) -> tuple[int, ...]:
        """Return what is open, for a copy of this process that must not keep it."""
        lane = () if self._lane is None else (self._lane.fileno(),)
        return (self._channel.fileno(), *lane, *(() if self._bell is None else (self._bell,)))

    def _answer(self, lane: Channel, key: str) -> dict[str, Any] | Unanswered:
        give_up_at = time.monotonic() + limits.LANE_PATIENCE_S
        while lane.has_more or (left_s := give_up_at - time.monotonic()) > 0:
            ready = [fd for fd, _ in self._poll.poll(0 if lane.has_more else left_s * 1000)]
            if self._channel.fileno() in ready or not (ready or lane.has_more):
                break  # the broker has the execution in hand, or has ended the lane; or the time is up
            self._reading = True
            try:
                header, _, fd = lane.receive()
            except (EOFError, OSError, frames.FrameError):
                lane.end()
                return Unanswered.HOST_NOT_TOLD
            self._reading = False
            if fd is not None:
                os.close(fd)
            if header.get("type") == "answer" and header.get("key") == key:
                return (
                    header
                    if "state" in header
                    else (Unanswered.HOST_NOT_TOLD if header.get("told") == "refused" else Unanswered.LATE)
                )
        return Unanswered.HOST_NOT_TOLD  # it may have refused, which is not read yet

    def _is_called(self) -> bool:
        """Tell whether the broker has sent something: from then on the lane brings no answers."""
        return any(fd == self._channel.fileno() for fd, _ in self._poll.poll(0))

    def _is_new(self, message: Message) -> bool:
        return message.header["execution_id"] not in self._seen

    def _next(self) -> Message:
        if self._lane is None or self._channel.has_more:
            return Message(*self._channel.receive(), on_lane=False)
        # Always the channel first: the broker may end the lane, and what is left in there must not run then.
        ready = self._poll.poll(0 if self._lane.has_more else None)
        if self._channel.fileno() in [fd for fd, _ in ready]:
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

    def _close_lane(self) -> None:
        if self._lane is not None:
            self._poll.unregister(self._lane.fileno())
            self._lane.close()
            self._lane = None

    def _replace_bell(self, bell: int | None) -> None:
        if self._bell is not None:
            os.close(self._bell)
        self._bell = bell
