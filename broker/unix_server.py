"""gevent's WSGI server on a Unix socket: the peer's identity, one send per reply, errors in JSON."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import gevent
from flask import Flask
from gevent import pywsgi
from gevent import socket as gevent_socket

from broker.errors import BadRequest, BrokerError, Forbidden, InternalError
from broker.logs import Log
from broker.spawner import Peer

#: As many as connect at once when a thousand threads call tools; the kernel caps it at somaxconn.
_BACKLOG = 4096
_MAX_HEADERS = 64
_MAX_HEADER_LINE_BYTES = 8192
#: A first piece of a body up to this size leaves together with the headers.
_JOIN_BYTES = 64 << 10
#: How long a client that is refused may take to say what it wanted.
_REFUSED_WAIT_S = 1.0
#: The first request of a connection that wants to speak frames.
_UPGRADE_START = b"GET /v1/frames HTTP/1.1\r\n"
_UPGRADE_BYTES = 1024
_UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n"
_CREDENTIALS = struct.Struct("3i")


class Connection:
    """One accepted connection.

    Attributes:
        peer: Who connected.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        self.peer = Peer(pid=pid, uid=uid)

    def still_there(self) -> bool:
        """Tell whether the other side still holds the connection open."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLRDHUP)
        return not poll.poll(0)


#: Serves an upgraded connection on its socket, until it ends.
Serve = Callable[[Any, Connection], None]


class Headers(dict[str, str]):
    """Request headers by their lower-case names; pywsgi's own go through the mail parser."""

    status = ""

    def get(self, name: str, default: Any = None) -> Any:
        """Return a header. pywsgi asks for some in capitals: ``Connection``, ``Upgrade``."""
        return super().get(name.lower(), default)

    def getheader(self, name: str, default: str | None = None) -> str | None:
        """Return a header."""
        value: str | None = self.get(name, default)
        return value

    @property
    def typeheader(self) -> str | None:
        """The content type."""
        return self.getheader("content-type")


class UnixHandler(pywsgi.WSGIHandler):  # type: ignore[misc]
    """One connection's requests."""

    def MessageClass(self, rfile: Any, *_: Any) -> Headers:
        """Read the headers of a request.

        Raises:
            ValueError: Malformed, too many, too long, or one given twice.
        """
        headers = Headers()
        for _count in range(_MAX_HEADERS):
            line = rfile.readline(_MAX_HEADER_LINE_BYTES)
            if line in (b"\r\n", b"\n", b""):
                return headers
            name, colon, value = line.decode("latin-1").partition(":")
            name = name.lower()
            if not colon or name != name.strip() or name in headers or not line.endswith(b"\n"):
                raise ValueError("malformed header")
            headers[name] = value.strip()
        raise ValueError("too many headers")

    def _headers(self) -> Iterator[tuple[str, str]]:
        for name, value in self.headers.items():
            if name not in ("content-type", "content-length") and "_" not in name:
                yield "HTTP_" + name.replace("-", "_").upper(), value

    def get_environ(self) -> dict[str, Any]:
        """Return the WSGI environment, with the connection."""
        environ: dict[str, Any] = super().get_environ()
        environ["rlm_sandbox.connection"] = self.server.connections[self.socket]
        return environ

    def read_requestline(self) -> str:
        """Read the first line of a request, after everybody else had a turn.

        Where the next request has arrived already, reading it does not wait; without this, one client that sends
        requests in a row would be the only one served.
        """
        gevent.sleep(0)
        line: str = super().read_requestline()
        return line

    def handle_one_request(self) -> Any:
        """Serve one request; what pywsgi would answer as text is answered in JSON."""
        result = super().handle_one_request()
        if isinstance(result, tuple):
            return result[0], canned_reply(BadRequest("malformed HTTP request"))
        return result

    def _write_with_headers(self, data: bytes) -> None:
        # pywsgi sends headers and body apart, which costs a system call and wakes the client twice.
        self.headers_sent = True
        self.finalize_headers()
        lines = [b"HTTP/1.1 " + self.status, *(name + b": " + value for name, value in self.response_headers), b"", b""]
        head = b"\r\n".join(lines)
        if self.response_use_chunked or len(data) > _JOIN_BYTES:
            self._sendall(head)
            self._write(data)
        else:
            self._sendall(head + bytes(data))

    def _send_error_response_if_possible(self, error_code: int) -> None:
        self.close_connection = True
        if not self.response_length:
            error = BadRequest("malformed request") if error_code == 400 else InternalError("a defect of the broker")
            self.socket.sendall(canned_reply(error))

    def _log_error(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        self.server.log_defect(error)

    def log_error(self, message: str, *arguments: Any) -> None:
        """Malformed requests are answered, not logged: anybody can send them without end."""

    def log_request(self) -> None:
        """Requests are not logged: there are thousands each second."""


class UnixServer(pywsgi.WSGIServer):  # type: ignore[misc]
    """Serves one Flask app on one Unix socket.

    Args:
        path: Where the socket is made; a stale socket there is removed.
        mode: Its permissions.
        app: The app.
        log: For defects.
        admit: Called with each new connection's peer; may raise a ``BrokerError``, which is the only answer then.
        left: Called when an admitted connection has been closed.
        upgrades: What serves a connection whose first request asks to speak a protocol, by that protocol's name.
    """

    def __init__(
        self,
        path: str,
        mode: int,
        app: Flask,
        *,
        log: Log,
        admit: Callable[[Peer], None],
        left: Callable[[Peer], None],
        upgrades: Mapping[str, Serve] = MappingProxyType({}),
    ) -> None:
        self.connections: dict[Any, Connection] = {}
        self._path, self._log, self._admit, self._left = path, log, admit, left
        self._upgrades = upgrades
        super().__init__(_listen(path, mode), app, handler_class=UnixHandler, log=None, error_log=None)

    def handle(self, sock: Any, address: Any) -> None:
        """Serve one connection until it ends. Whatever goes wrong is logged by us: gevent would print it, unbounded."""
        try:
            self._serve_admitted(sock, address)
        except Exception as error:
            self.log_defect(error)

    def _serve_admitted(self, sock: Any, address: Any) -> None:
        connection = Connection(sock)
        try:
            self._admit(connection.peer)
        except BrokerError as error:
            # A client that is cut off while it still sends would not see the answer.
            with gevent.Timeout(_REFUSED_WAIT_S, False):
                sock.recv(65536)
            sock.sendall(canned_reply(error))
            return
        self.connections[sock] = connection
        try:
            serve = self._upgrade(sock)
            if serve is None:
                super().handle(sock, address)
            else:
                serve(sock, connection)
        finally:
            del self.connections[sock]
            self._left(connection.peer)

    def _upgrade(self, sock: Any) -> Serve | None:
        """Agree to speak another protocol, where that is all that the client has asked so far.

        Here and not in a handler, because generated code opens hundreds of these at a time, and they cost little so.
        """
        head = sock.recv(_UPGRADE_BYTES, socket.MSG_PEEK)
        if not (head.startswith(_UPGRADE_START) and head.endswith(b"\r\n\r\n")):
            return None
        fields = [line.partition(b":") for line in head[len(_UPGRADE_START) : -4].lower().split(b"\r\n")]
        asked = [value.strip() for name, _, value in fields if name == b"upgrade"]
        serve = self._upgrades.get(asked[0].decode("latin-1")) if len(asked) == 1 else None
        if serve is not None:
            sock.recv(len(head))
            sock.sendall(_UPGRADED % asked[0])
        return serve

    def living_connections(self) -> int:
        """Count the connections whose other side is still there; one that waits for an answer may have died."""
        return sum(connection.still_there() for connection in self.connections.values())

    def log_defect(self, error: BaseException) -> None:
        """Log an exception that reached the server."""
        if not isinstance(error, OSError):  # a client that went away
            self._log.defect("server", error)

    def close_all(self) -> None:
        """Stop listening, close every connection, and remove the socket."""
        self.stop(timeout=0)
        for sock in list(self.connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # what was upgraded reads on a descriptor of its own
            sock.close()
        if os.path.exists(self._path):
            os.unlink(self._path)


def only_uids(allowed: frozenset[int]) -> Callable[[Peer], None]:
    """Return an ``admit`` that refuses everybody else."""

    def admit(peer: Peer) -> None:
        if peer.uid not in allowed:
            raise Forbidden("this user may not speak to the sandbox's host plane")

    return admit


def canned_reply(error: BrokerError) -> bytes:
    """Return a whole HTTP reply that ends the connection."""
    body = json.dumps(error.to_json()).encode()
    head = f"HTTP/1.1 {error.status} {error.code}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def _listen(path: str, mode: int) -> Any:
    """Return a listening socket; it appears under ``path`` only once a connect to it succeeds."""
    unborn = f"{path}.new"
    for stale in (unborn, path):
        try:
            if stat.S_ISSOCK(os.lstat(stale).st_mode):
                os.unlink(stale)
        except FileNotFoundError:
            pass
    listener = gevent_socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(unborn)
    os.chmod(unborn, mode)
    listener.listen(_BACKLOG)
    os.rename(unborn, path)
    return listener
