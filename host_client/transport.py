"""How requests reach a broker: HTTP over its Unix socket, on a few connections that are kept open."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from broker.protocol import frames, limits
from broker.protocol.frames import Blob
from host_client import unix_socket
from host_client.errors import BrokerUnreachable, MalformedReply
from host_client.http_wire import BadReply, ConnectionEnded, Exchange

#: One for the thread that waits, and some for the threads that run tools.
_MAX_IDLE_CONNECTIONS = 8
_CONNECT_TIMEOUT_S = 5.0


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


class BrokerTimeout(BrokerUnreachable):
    """The broker is there but did not answer in time."""


class Transport(Protocol):
    """How one request reaches the broker. Implementations are safe to share between threads."""

    def request(
        self,
        method: str,
        path: str,
        header: dict[str, Any] | None = None,
        blobs: Sequence[Blob] = (),
        *,
        timeout_s: float,
        max_reply_bytes: int = limits.MAX_TOOL_CALL_BYTES,
    ) -> Reply:
        """Send one request and return the reply, whatever its status.

        Args:
            method: HTTP method.
            path: Such as ``/v1/health``.
            header: JSON object of the body, or None for no body.
            blobs: Raw parts; with any, the body is a frame.
            timeout_s: For the whole exchange, in seconds.
            max_reply_bytes: Largest body taken.

        Raises:
            BrokerUnreachable: Nothing listens, the connection broke, or ``BrokerTimeout``.
            MalformedReply: What came is not a reply of our protocol.
        """

    def close(self) -> None:
        """Close what is open. Idempotent."""


class UnixSocketTransport:
    """A ``Transport`` to ``host.sock`` in a directory of this machine.

    Args:
        socket_path: The socket.
    """

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        # Guards _idle, _pid and _closed: a connection is in _idle or in the hands of one thread, never both.
        # Reentrant, because the garbage collector may close the session in any thread, also in one that is in here.
        self._lock = threading.RLock()
        self._idle: list[socket.socket] = []
        self._pid = os.getpid()
        self._closed = False

    def request(
        self,
        method: str,
        path: str,
        header: dict[str, Any] | None = None,
        blobs: Sequence[Blob] = (),
        *,
        timeout_s: float,
        max_reply_bytes: int = limits.MAX_TOOL_CALL_BYTES,
    ) -> Reply:
        """See ``Transport.request``. A kept connection that the broker had closed is replaced, once."""
        content_type, body = _body(header, blobs)
        connection = self._take()
        try:
            if connection is not None:
                try:
                    return self._exchange(connection, method, path, content_type, body, timeout_s, max_reply_bytes)
                except (ConnectionEnded, BrokenPipeError, ConnectionResetError) as error:
                    if isinstance(error, ConnectionEnded) and not error.clean:
                        raise
            connection = unix_socket.connect(self._path, timeout_s=min(timeout_s, _CONNECT_TIMEOUT_S))
            return self._exchange(connection, method, path, content_type, body, timeout_s, max_reply_bytes)
        except TimeoutError:
            raise BrokerTimeout(f"the broker did not answer {method} {path} within {timeout_s:.1f} s") from None
        except OSError as error:
            raise BrokerUnreachable(f"no answer from the broker: {error.strerror or error}") from None
        except (BadReply, frames.FrameError) as error:
            raise MalformedReply(f"the broker's answer to {method} {path} is malformed: {error}") from None

    def close(self) -> None:
        """Close the idle connections, and every other one as soon as it is given back."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for connection in idle:
            connection.close()

    def _exchange(
        self,
        connection: socket.socket,
        method: str,
        path: str,
        content_type: str,
        body: Sequence[Blob],
        timeout_s: float,
        max_reply_bytes: int,
    ) -> Reply:
        reusable = False
        try:
            exchange = Exchange(connection, timeout_s=timeout_s)
            exchange.send(method, path, content_type, body)
            status, reply_type, reusable, received = exchange.receive(max_bytes=max_reply_bytes)
        finally:
            self._give_back(connection, reusable)
        if reply_type.startswith(frames.FRAME_CONTENT_TYPE):
            return Reply(status, *frames.load_frame(received, max_bytes=max_reply_bytes))
        return Reply(status, frames.parse_json_object(received) if received else {}, [])

    def _take(self) -> socket.socket | None:
        with self._lock:
            if self._pid != os.getpid():
                # After a fork: these connections are the parent's, who is using them.
                inherited, self._idle, self._pid = self._idle, [], os.getpid()
                for connection in inherited:
                    connection.close()
            return self._idle.pop() if self._idle else None

    def _give_back(self, connection: socket.socket, reusable: bool) -> None:
        with self._lock:
            if reusable and not self._closed and len(self._idle) < _MAX_IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()


def _body(header: dict[str, Any] | None, blobs: Sequence[Blob]) -> tuple[str, Sequence[Blob]]:
    if header is None:
        return frames.JSON_CONTENT_TYPE, ()
    if blobs:
        return frames.FRAME_CONTENT_TYPE, frames.dump_frame(header, blobs)
    return frames.JSON_CONTENT_TYPE, (json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii"),)
