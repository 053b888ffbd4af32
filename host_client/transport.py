"""How requests reach a broker: HTTP over its Unix socket, or a way to it, on a few connections that are kept open."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from broker.protocol import fast_json, frames, limits, raw_output
from broker.protocol.blob_file import AVAILABLE as BLOB_FILES
from broker.protocol.blob_file import BlobFile, as_bytes
from broker.protocol.frames import Blob
from broker.protocol.reading import BadRequest, Reader
from host_client import unix_socket
from host_client.errors import BrokerUnreachable, MalformedReply
from host_client.http_wire import BadReply, ConnectionEnded, Exchange, FileLost
from host_client.lane import Lane
from host_client.together import SMALL_BYTES, Together

#: One for the thread that waits, and some for the threads that run tools.
_MAX_IDLE_CONNECTIONS = 8
_CONNECT_TIMEOUT_S = 5.0
_FILE_MISSING = 424
_SPOKEN = ("", frames.FRAMED_UPGRADE, frames.FILES_UPGRADE)


class Reply(NamedTuple):
    """A reply.

    Attributes:
        status: HTTP status.
        header: The JSON object.
        blobs: Raw parts beside it.
    """

    status: int
    header: dict[str, Any]
    blobs: list[memoryview]


Answer = TypeVar("Answer")
#: Sends a request and reads its reply; also tells whether the connection can be used again.
Talk = Callable[[Exchange], tuple[Answer, bool]]


class BrokerTimeout(BrokerUnreachable):
    """The broker is there but did not answer in time."""


class Transport(Protocol):
    """How one request reaches the broker. Implementations are safe to share between threads."""

    def request(
        self,
        method: str,
        path: str,
        header: dict[str, Any] | None = None,
        blobs: Sequence[Blob | str] = (),
        *,
        timeout_s: float,
        max_reply_bytes: int = limits.MAX_TOOL_CALL_BYTES,
        framed: bool = False,
        together: bool = False,
        on_more: Callable[[Reply], None] = lambda reply: None,
    ) -> Reply:
        """Send one request and return the reply, whatever its status.

        Args:
            method: HTTP method.
            path: Such as ``/v1/health``.
            header: JSON object of the body, or None for no body.
            blobs: Raw parts; with any, the body is a frame.
            timeout_s: For the whole exchange, in seconds.
            max_reply_bytes: Largest body taken.
            framed: The broker serves this request in frames too, which costs less where the transport can; its blobs
                may also be ASCII texts.
            together: It may wait for, and travel with, those of other threads; for requests that are answered at once.
            on_more: Takes each reply that says that another one follows (``"more": true``).

        Raises:
            BrokerUnreachable: Nothing listens, the connection broke, or ``BrokerTimeout``.
            MalformedReply: What came is not a reply of our protocol.
        """

    def open_lane(self, path: str, timeout_s: float) -> Lane | None:
        """Return a session's lane, or None where there cannot be one.

        Args:
            path: The request for it.
            timeout_s: For the whole exchange, in seconds.
        """

    def close(self) -> None:
        """Close what is open. Idempotent."""


class SocketTransport:
    """A ``Transport`` over connected sockets.

    Args:
        dial: Returns a new one, within so many seconds; raises ``OSError`` or ``BrokerUnreachable``.
        files: Whether descriptors arrive at the other end.
        connect_timeout_s: How long ``dial`` may take at most.
        on_close: Called once, by ``close``.
        can_resume: Whether the way may break and be mended while the broker goes on, so that a broken connection does
            not mean that it has ended.

    Attributes:
        breaks: How many connections have broken so far.
    """

    def __init__(
        self,
        dial: Callable[[float], socket.socket],
        *,
        files: bool = True,
        connect_timeout_s: float = _CONNECT_TIMEOUT_S,
        on_close: Callable[[], None] = lambda: None,
        can_resume: bool = False,
    ) -> None:
        fast_json.use()
        self._dial, self._on_close, self.can_resume = dial, on_close, can_resume
        self._connect_timeout_s = connect_timeout_s
        self.breaks = 0
        # Guards _idle, _pid and _closed: a connection is in _idle or in the hands of one thread, never both.
        # Reentrant, because the garbage collector may close the session in any thread, also in one that is in here.
        self._lock = threading.RLock()
        # By what they speak: "" for HTTP, or what they were upgraded to.
        self._idle: dict[str, list[Exchange]] = {spoken: [] for spoken in _SPOKEN}
        self._refused: set[str] = set() if files and BLOB_FILES else {frames.FILES_UPGRADE}
        self._pid = os.getpid()
        self._closed = False
        self._together = Together(self._exchange_all)

    def dial(self, timeout_s: float) -> socket.socket:
        """Return a connection of the caller's own.

        Raises:
            OSError, BrokerUnreachable: None can be had.
        """
        return self._dial(timeout_s)

    def request(
        self,
        method: str,
        path: str,
        header: dict[str, Any] | None = None,
        blobs: Sequence[Blob | str] = (),
        *,
        timeout_s: float,
        max_reply_bytes: int = limits.MAX_TOOL_CALL_BYTES,
        framed: bool = False,
        together: bool = False,
        on_more: Callable[[Reply], None] = lambda reply: None,
    ) -> Reply:
        """See ``Transport.request``. A kept connection that the broker had closed is replaced, once."""
        spoken = self._spoken() if framed else ""
        try:
            if together and spoken and not blobs:
                message = b"".join(frames.dump_frame({"request": f"{method} {path}", "body": header or {}}))
                reply = self._together.send(message, timeout_s) if len(message) <= SMALL_BYTES else None
                if reply is not None:
                    return reply
            if spoken:
                files = spoken == frames.FILES_UPGRADE
                talk = partial(_in_frames, f"{method} {path}", header or {}, blobs, files, max_reply_bytes, on_more)
            else:
                talk = partial(_over_http, method, path, _body(header, as_bytes(blobs)), max_reply_bytes)
            try:
                reply = self._talk(spoken, talk, timeout_s)
            except FileLost:
                reply = None  # asking again gives the same answer: what was done is stored
            if reply is not None and not (spoken == frames.FILES_UPGRADE and reply.status == _FILE_MISSING):
                return reply
            self._refused.add(spoken)  # a broker that does not speak that, or a way on which descriptors get lost
            return self.request(
                method,
                path,
                header,
                blobs,
                timeout_s=timeout_s,
                max_reply_bytes=max_reply_bytes,
                framed=framed,
                on_more=on_more,
            )
        except TimeoutError:
            raise BrokerTimeout(f"the broker did not answer {method} {path} within {timeout_s:.1f} s") from None
        except OSError as error:
            self.breaks += 1
            raise BrokerUnreachable(f"no answer from the broker: {error.strerror or error}") from None
        except (BadReply, frames.FrameError, BadRequest) as error:
            raise MalformedReply(f"the broker's answer to {method} {path} is malformed: {error}") from None

    def open_lane(self, path: str, timeout_s: float) -> Lane | None:
        """See ``Transport.open_lane``. A descriptor is handed over, as with memory files."""
        if frames.FILES_UPGRADE in self._refused:
            return None
        connection = None
        try:
            connection = self._open(frames.FILES_UPGRADE, timeout_s)
            lane = None if connection is None else Lane.open(connection, path)
            if lane is not None:
                connection = None
            return lane
        except (OSError, BadReply, frames.FrameError, BrokerUnreachable):
            return None  # whatever it is, the ordinary way shows it
        finally:
            if connection is not None:
                connection.close()

    def close(self) -> None:
        """Close the idle connections, and every other one as soon as it is given back."""
        with self._lock:
            idle, self._idle = self._idle, {spoken: [] for spoken in _SPOKEN}
            first, self._closed = not self._closed, True
        _close_all(idle)
        if first:
            self._on_close()

    def _spoken(self) -> str:
        """Choose how a request travels that the broker serves in frames: the best that it has not refused."""
        if frames.FILES_UPGRADE not in self._refused:
            return frames.FILES_UPGRADE
        return "" if frames.FRAMED_UPGRADE in self._refused else frames.FRAMED_UPGRADE

    def _exchange_all(self, messages: Sequence[bytes], timeout_s: float) -> list[Reply] | None:
        """Send small framed requests at once; return their replies in order, None where the broker speaks no frames."""
        return self._talk(frames.FRAMED_UPGRADE, partial(_all_in_frames, messages), timeout_s)

    def _talk(self, spoken: str, talk: Talk[Answer], timeout_s: float) -> Answer | None:
        """Talk on a connection that speaks this; return None where the broker does not."""
        connection = self._take(spoken)
        if connection is not None:
            try:
                return self._exchange(connection, talk, timeout_s, spoken)
            except (ConnectionEnded, BrokenPipeError, ConnectionResetError) as error:
                self.breaks += 1
                if isinstance(error, ConnectionEnded) and not error.clean:
                    raise
        connection = self._open(spoken, min(timeout_s, self._connect_timeout_s))
        return None if connection is None else self._exchange(connection, talk, timeout_s, spoken)

    def _open(self, spoken: str, timeout_s: float) -> Exchange | None:
        """Return a new connection, or None where the broker does not speak what is asked for."""
        connection = Exchange(self._dial(timeout_s))
        try:
            connection.begin(timeout_s)
            if not spoken or connection.upgrade("/v1/frames", spoken):
                return connection
        except BaseException:
            connection.close()
            raise
        connection.close()
        return None

    def _exchange(self, connection: Exchange, talk: Talk[Answer], timeout_s: float, spoken: str) -> Answer:
        reusable = False
        try:
            connection.begin(timeout_s)
            reply, reusable = talk(connection)
        finally:
            self._give_back(connection, spoken, reusable)
        return reply

    def _take(self, spoken: str) -> Exchange | None:
        with self._lock:
            if self._pid != os.getpid():
                # After a fork: these connections are the parent's, who is using them.
                inherited, self._idle, self._pid = self._idle, {each: [] for each in _SPOKEN}, os.getpid()
                _close_all(inherited)
            return self._idle[spoken].pop() if self._idle[spoken] else None

    def _give_back(self, connection: Exchange, spoken: str, reusable: bool) -> None:
        with self._lock:
            if reusable and not self._closed and len(self._idle[spoken]) < _MAX_IDLE_CONNECTIONS:
                self._idle[spoken].append(connection)
                return
        connection.close()


class UnixSocketTransport(SocketTransport):
    """A ``Transport`` to ``host.sock`` in a directory of this machine.

    Args:
        socket_path: The socket.
    """

    def __init__(self, socket_path: Path) -> None:
        super().__init__(lambda timeout_s: unix_socket.connect(socket_path, timeout_s=timeout_s))


def _close_all(connections: Mapping[str, Sequence[Exchange]]) -> None:
    for connection in itertools.chain.from_iterable(connections.values()):
        connection.close()


def _in_frames(
    request: str,
    body: dict[str, Any],
    blobs: Sequence[Blob | str],
    files: bool,
    max_reply_bytes: int,
    on_more: Callable[[Reply], None],
    exchange: Exchange,
) -> tuple[Reply, bool]:
    _send_framed(exchange, {"request": request, "body": body, raw_output.ASKED: True}, blobs, files=files)
    while True:
        reply = read_reply(*exchange.receive_frame(max_bytes=max_reply_bytes))
        if reply.header.get("more") is not True:
            exchange.check_end()
            return reply, True
        on_more(reply)


def _send_framed(exchange: Exchange, header: dict[str, Any], blobs: Sequence[Blob | str], *, files: bool) -> None:
    """Send a request, large blobs in a file where those arrive.

    The file is closed at once: whoever closes it last frees its memory, 120 us for 1 MiB, and that is not to be the one
    who waits for the reply.
    """
    file = BlobFile.worth(blobs) if blobs and files else None
    if file is None:
        exchange.send_frame(frames.dump_frame(header, as_bytes(blobs)))
        return
    try:
        exchange.send_frame(frames.dump_frame({**header, "file": True, "blobs": file.lengths}), file.fd)
    finally:
        file.close()


def _all_in_frames(messages: Sequence[bytes], exchange: Exchange) -> tuple[list[Reply], bool]:
    exchange.send_frame(messages)
    replies = [read_reply(*exchange.receive_frame(max_bytes=limits.MAX_TOOL_CALL_BYTES)) for _ in messages]
    exchange.check_end()
    return replies, True


def read_reply(header: dict[str, Any], blobs: Sequence[Any]) -> Reply:
    """Return the reply in a frame.

    Raises:
        BadRequest: It is none.
    """
    read = Reader(header, "framed reply")
    return Reply(read.integer("status"), read.mapping("body"), list(blobs))


def _over_http(
    method: str, path: str, body: tuple[str, Sequence[Blob]], max_reply_bytes: int, exchange: Exchange
) -> tuple[Reply, bool]:
    exchange.send(method, path, *body)
    status, reply_type, reusable, received = exchange.receive(max_bytes=max_reply_bytes)
    if reply_type.startswith(frames.FRAME_CONTENT_TYPE):
        return Reply(status, *frames.load_frame(received, max_bytes=max_reply_bytes)), reusable
    return Reply(status, frames.parse_json_object(received) if received else {}, []), reusable


def _body(header: dict[str, Any] | None, blobs: Sequence[Blob]) -> tuple[str, Sequence[Blob]]:
    if header is None:
        return frames.JSON_CONTENT_TYPE, ()
    if blobs:
        return frames.FRAME_CONTENT_TYPE, frames.dump_frame(header, blobs)
    return frames.JSON_CONTENT_TYPE, (json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii"),)
