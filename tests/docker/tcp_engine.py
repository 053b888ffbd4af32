"""An engine behind TCP: a proxy of the test's own on the loopback interface, which can be cut off."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from host_client.providers.docker_engine import engine_url


class TcpEngine:
    """Passes connections on to the engine's socket.

    Attributes:
        url: For ``DOCKER_HOST``.
    """

    def __init__(self) -> None:
        self._target = engine_url().removeprefix("unix://")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        # Guards _open: every connection, both ends, until ``cut``.
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Drop every connection; new ones are taken."""
        with self._lock:
            dropped, self._open = self._open, []
        for each in dropped:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Listen no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                with self._lock:
                    self._open += [client, server]
                for here, there in ((client, server), (server, client)):
                    threading.Thread(target=_copy, args=(here, there), daemon=True).start()


@contextlib.contextmanager
def tcp_engine() -> Iterator[TcpEngine]:
    """An engine at ``url`` while the block runs."""
    engine = TcpEngine()
    try:
        yield engine
    finally:
        engine.close()


def _copy(here: socket.socket, there: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := here.recv(1 << 16):
            there.sendall(data)
    with contextlib.suppress(OSError):
        there.shutdown(socket.SHUT_WR)
