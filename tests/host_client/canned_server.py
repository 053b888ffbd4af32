"""A server that answers each request with bytes that the test wrote, good or bad."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

#: What one request is answered with: bytes, or a function that is given the connection.
Answer = bytes | Callable[[socket.socket], None]


class CannedServer:
    """Answers the n-th request with the n-th answer, whatever the request is.

    Attributes:
        path: The socket.
        requests: Raw requests, head and body.
        connections: How many were accepted.
    """

    def __init__(self, folder: Path, answers: Iterable[Answer]) -> None:
        self.path = folder / "host.sock"
        self.requests: list[bytes] = []
        self.connections = 0
        self._answers = iter(answers)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, StopIteration, ValueError):
            stream = connection.makefile("rb")
            while True:
                self.requests.append(_read_request(stream.readline, stream.read))
                answer = next(self._answers)
                if isinstance(answer, bytes):
                    connection.sendall(answer)
                else:
                    answer(connection)


def _read_request(readline: Callable[[], bytes], read: Callable[[int], bytes]) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = readline()
        if not line:
            raise ValueError("closed")
        head += line
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    return head + read(length)


def reply(body: bytes = b"{}", status: int = 200, *, kind: str = "application/json", more: str = "") -> bytes:
    """Return a well-formed reply."""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


@contextlib.contextmanager
def canned(folder: Path, *answers: Answer) -> Iterator[CannedServer]:
    """Serve the answers on a socket in ``folder``."""
    folder.chmod(0o700)
    server = CannedServer(folder, answers)
    try:
        yield server
    finally:
        server.close()
