"""Many connections over one stream of bytes: how the host reaches ``host.sock`` where the socket cannot be shared.

Both ends run the same loop: the host's on a thread of its own, the other in ``broker.relay``. A message is a header
and, for DATA, its bytes. Channels are numbered by the host; only the host opens them::

    OPEN   channel                connect to the broker, and carry bytes from now on
    DATA   channel size bytes     at most as many as were credited
    CREDIT channel size           so many bytes were passed on: send as many more
    END    channel                this side's connection is closed; nothing follows
    PING                          this side lives

A channel begins with ``WINDOW_BYTES`` of credit each way, so neither end ever holds more than that for a reader that
is slow, and a slow reader does not hold up the others. Who hears nothing for ``SILENCE_S`` takes the other for dead.
"""

from __future__ import annotations

import collections
import contextlib
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable
from typing import Protocol

#: What the relay says first, once the broker can be reached.
HELLO = b"rlm-sandbox relay 1\n"

#: Held at most for one reader that is slow; a round trip over a network carries as much.
WINDOW_BYTES = 1 << 20
#: As much is read from one connection in a row: the others get a turn after it.
CHUNK_BYTES = 64 << 10
#: Above this nothing more is read from connections until the stream has taken it.
_OUTBOX_BYTES = 256 << 10
#: Broker and tools together; more can only be a defect.
MAX_CHANNELS = 8192
PING_S = 15.0
#: A laptop that sleeps for longer has left its sandboxes.
SILENCE_S = 60.0

_HEADER = struct.Struct(">BII")
_OPEN, _DATA, _CREDIT, _END, _PING = range(1, 6)
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class TunnelBroken(Exception):
    """The other end broke the rules above; nothing that it says counts any more."""


class Stream(Protocol):
    """What a tunnel runs over. Neither method waits; both raise ``OSError`` where it is broken."""

    def read_fd(self) -> int:
        """Return the descriptor to wait on for reading."""

    def write_fd(self) -> int:
        """Return the descriptor to wait on for writing; may be the same."""

    def read(self) -> bytes | None:
        """Return what has come, ``b""`` at its end, or None where there is nothing now."""

    def write(self, data: bytes | memoryview) -> int:
        """Send what can be sent now; return how much."""


class _Channel:
    """One connection: what waits to be written to it, and how much may still be read from it."""

    def __init__(self, number: int, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.number, self.sock = number, sock
        self.waiting: collections.deque[memoryview] = collections.deque()
        self.waiting_bytes = 0
        self.credit = WINDOW_BYTES
        #: Passed on, but not yet credited to the other end.
        self.owed = 0
        #: The other end has closed; so does this one when everything is written.
        self.ending = False
        self.interest = 0


class Tunnel:
    """One end.

    Args:
        stream: Leads to the other end.
        connect: Returns a new connection for a channel that the other end opens; None where it must not open any.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        stream: Stream,
        connect: Callable[[], socket.socket] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._connect, self._clock = stream, connect, clock
        self._selector = selectors.DefaultSelector()
        self._channels: dict[int, _Channel] = {}
        self._stalled: set[int] = set()
        self._inbox = bytearray()
        self._outbox: collections.deque[bytes | memoryview] = collections.deque()
        self._outbox_bytes = 0
        self._stream_interest = 0
        self._numbers = 0
        # Appended to by any thread, emptied by the one that runs.
        self._asked: collections.deque[socket.socket] = collections.deque()
        self._woken, self._waker = socket.socketpair()
        self._closing = False
        self.ended = False
        self._heard_at = self._said_at = clock()

    def open(self) -> socket.socket:
        """Return a connection to what the other end connects to; from any thread. It ends if that cannot be had.

        Raises:
            ConnectionRefusedError: The tunnel has ended.
        """
        ours, theirs = socket.socketpair()
        self._asked.append(theirs)
        self._wake()
        if self.ended:
            ours.close()
            theirs.close()
            raise ConnectionRefusedError("the tunnel to the sandbox has ended")
        return ours

    def close(self) -> None:
        """Let ``run`` return; from any thread."""
        self._closing = True
        self._wake()

    def run(self) -> None:
        """Carry bytes until the stream ends or ``close`` is called; every connection is closed then.

        Raises:
            TunnelBroken: The other end broke the rules.
            OSError: The stream broke, or the other end has fallen silent (``TimeoutError``).
        """
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._woken, _READ, None)
        try:
            self._watch_stream()
            while not self._closing and self._turn():
                pass
        finally:
            self._end()

    def _turn(self) -> bool:
        for key, events in self._selector.select(self._pause_s()):
            if isinstance(key.data, _Channel):
                self._serve(key.data, events)
            elif key.data is None:
                self._take_asked()
            elif events & _READ and not self._receive():
                return False
        self._keep_alive()
        self._flush()
        return True

    # The stream.

    def _receive(self) -> bool:
        data = self._stream.read()
        while data:
            self._heard_at = self._clock()
            self._inbox += data
            self._take_messages()
            if self._outbox:
                self._flush()  # credit, before whoever sends has used up all that it had
            data = self._stream.read()
        return data is None

    def _take_messages(self) -> None:
        inbox, at = self._inbox, 0
        while len(inbox) - at >= _HEADER.size:
            kind, number, size = _HEADER.unpack_from(inbox, at)
            after = at + _HEADER.size
            if kind == _DATA:
                if size > WINDOW_BYTES:
                    raise TunnelBroken(f"a piece of {size} bytes")
                if len(inbox) - after < size:
                    break
                self._deliver(number, bytes(memoryview(inbox)[after : after + size]))
                after += size
            else:
                self._obey(kind, number, size)
            at = after
        del inbox[:at]

    def _obey(self, kind: int, number: int, size: int) -> None:
        channel = self._channels.get(number)
        if kind == _OPEN:
            self._accept(number)
        elif kind not in (_CREDIT, _END, _PING):
            raise TunnelBroken(f"a message of kind {kind}")
        elif channel is not None and kind == _CREDIT:
            channel.credit += size
            if channel.credit > WINDOW_BYTES:
                raise TunnelBroken("more credit than was used")
            self._update(channel)
        elif channel is not None and kind == _END:
            channel.ending = True
            if not channel.waiting:
                self._drop(channel)

    def _accept(self, number: int) -> None:
        if self._connect is None or number in self._channels or len(self._channels) >= MAX_CHANNELS:
            raise TunnelBroken("a channel that must not be opened")
        try:
            self._add(number, self._connect())
        except OSError:
            self._say(_END, number)

    def _deliver(self, number: int, data: bytes) -> None:
        channel = self._channels.get(number)
        if channel is None or channel.ending:
            return  # it was closed here while this was on its way
        channel.waiting.append(memoryview(data))
        channel.waiting_bytes += len(data)
        if channel.waiting_bytes + channel.owed > WINDOW_BYTES:
            raise TunnelBroken("more bytes than were credited")
        if len(channel.waiting) == 1:
            self._write(channel)

    def _say(self, kind: int, number: int = 0, size: int = 0) -> None:
        self._send(_HEADER.pack(kind, number, size))

    def _send(self, message: bytes) -> None:
        self._outbox.append(message)
        self._outbox_bytes += len(message)

    def _flush(self) -> None:
        while self._outbox:
            if len(self._outbox) > 1 and self._outbox_bytes <= _OUTBOX_BYTES + CHUNK_BYTES:
                joined = b"".join(self._outbox)
                self._outbox.clear()
                self._outbox.append(joined)
            piece = memoryview(self._outbox[0])
            sent = self._stream.write(piece)
            if sent:
                self._said_at = self._clock()
                self._outbox_bytes -= sent
            if sent < len(piece):
                self._outbox[0] = piece[sent:]
                break
            self._outbox.popleft()
        self._watch_stream()
        if self._stalled and self._outbox_bytes < _OUTBOX_BYTES:
            stalled, self._stalled = self._stalled, set()
            for channel in filter(None, map(self._channels.get, stalled)):
                self._update(channel)

    def _watch_stream(self) -> None:
        wanted = _READ | (_WRITE if self._outbox else 0)
        if wanted == self._stream_interest:
            return
        read_fd, write_fd = self._stream.read_fd(), self._stream.write_fd()
        if not self._stream_interest:
            self._selector.register(read_fd, _READ, "stream")
        if read_fd == write_fd:
            self._selector.modify(read_fd, wanted, "stream")
        elif wanted & _WRITE:
            self._selector.register(write_fd, _WRITE, "stream")
        elif self._stream_interest & _WRITE:
            self._selector.unregister(write_fd)
        self._stream_interest = wanted

    def _pause_s(self) -> float:
        return max(0.0, min(self._said_at + PING_S, self._heard_at + SILENCE_S) - self._clock())

    def _keep_alive(self) -> None:
        now = self._clock()
        if now - self._heard_at >= SILENCE_S:
            raise TimeoutError(f"nothing was heard from the other end for {SILENCE_S:g} s")
        if now - self._said_at >= PING_S and not self._outbox:
            self._say(_PING)

    # The connections.

    def _take_asked(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while self._asked:
            self._numbers = self._numbers % 0xFFFF_FFFF + 1
            self._say(_OPEN, self._numbers)
            self._add(self._numbers, self._asked.popleft())

    def _add(self, number: int, sock: socket.socket) -> None:
        channel = self._channels[number] = _Channel(number, sock)
        self._update(channel)

    def _serve(self, channel: _Channel, events: int) -> None:
        if events & _WRITE:
            self._write(channel)
        if events & _READ and self._channels.get(channel.number) is channel:
            self._read(channel)

    def _read(self, channel: _Channel) -> None:
        if self._outbox_bytes >= _OUTBOX_BYTES or not channel.credit:
            self._update(channel)
            return
        try:
            data = channel.sock.recv(min(CHUNK_BYTES, channel.credit))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(channel, tell=True)
            return
        channel.credit -= len(data)
        self._send(_HEADER.pack(_DATA, channel.number, len(data)) + data)

    def _write(self, channel: _Channel) -> None:
        try:
            while channel.waiting:
                piece = channel.waiting[0]
                sent = channel.sock.send(piece)
                channel.waiting_bytes -= sent
                channel.owed += sent
                if sent < len(piece):
                    channel.waiting[0] = piece[sent:]
                    break
                channel.waiting.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._drop(channel, tell=True)
            return
        if channel.ending and not channel.waiting:
            self._drop(channel)
            return
        if channel.owed >= WINDOW_BYTES // 4:
            self._say(_CREDIT, channel.number, channel.owed)
            channel.owed = 0
        self._update(channel)

    def _update(self, channel: _Channel) -> None:
        """Wait for what this connection can do now."""
        wanted = _WRITE if channel.waiting else 0
        if channel.credit and not channel.ending:
            if self._outbox_bytes < _OUTBOX_BYTES:
                wanted |= _READ
            else:
                self._stalled.add(channel.number)
        if wanted == channel.interest:
            return
        if not channel.interest:
            self._selector.register(channel.sock, wanted, channel)
        elif wanted:
            self._selector.modify(channel.sock, wanted, channel)
        else:
            self._selector.unregister(channel.sock)
        channel.interest = wanted

    def _drop(self, channel: _Channel, *, tell: bool = False) -> None:
        if channel.interest:
            self._selector.unregister(channel.sock)
        channel.sock.close()
        del self._channels[channel.number]
        if tell or not channel.ending:
            self._say(_END, channel.number)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._waker.send(b"\0")

    def _end(self) -> None:
        self.ended = True
        for channel in self._channels.values():
            channel.sock.close()
        self._channels.clear()
        # After ``ended`` is set: who asked before is answered here, who asks later is refused.
        while self._asked:
            self._asked.popleft().close()
        self._selector.close()
        self._woken.close()
        self._waker.close()


class Pipes:
    """A ``Stream`` over two descriptors, such as standard input and output.

    Args:
        reading: The one to read.
        writing: The one to write.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)

    def read_fd(self) -> int:
        """See ``Stream.read_fd``."""
        return self._reading

    def write_fd(self) -> int:
        """See ``Stream.write_fd``."""
        return self._writing

    def read(self) -> bytes | None:
        """See ``Stream.read``."""
        try:
            return os.read(self._reading, CHUNK_BYTES)
        except BlockingIOError:
            return None

    def write(self, data: bytes | memoryview) -> int:
        """See ``Stream.write``."""
        try:
            return os.write(self._writing, data)
        except BlockingIOError:
            return 0
