"""Services of the host that anybody on it may speak to: a port of the loopback, and a socket without a path."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.adversarial.arena import Arena

pytestmark = [pytest.mark.docker, pytest.mark.family("network")]

_SILENCE_S = 5.0


class Service:
    """Counts who connects.

    Args:
        listener: Bound.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._listener.listen()
        self._listener.settimeout(_SILENCE_S)
        self.count = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                if connection.recv(1) == b"!":
                    return
                self.count += 1

    def counted(self) -> int:
        """End it; return how many connected."""
        with socket.socket(self._listener.family) as last:
            last.connect(self._listener.getsockname())
            last.sendall(b"!")
            self._thread.join()
        self._listener.close()
        return self.count


@pytest.fixture(params=["a port", "an abstract socket"])
def service(request: pytest.FixtureRequest) -> Iterator[tuple[Service, str]]:
    """A service, and the code that speaks to it."""
    if request.param == "a port":
        listener = socket.create_server(("127.0.0.1", 0))
        speak = f"socket.create_connection({listener.getsockname()!r}, 5).sendall(b'x')"
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0rlm-sandbox-{secrets.token_hex(8)}")
        speak = f"connect({listener.getsockname()!r}).sendall(b'x')"
    yield Service(listener), speak
    listener.close()


def test_a_service_of_the_host_is_not_reached(service: tuple[Service, str], arena: Arena) -> None:
    there, speak = service
    target = arena.target()
    assert target.run(f"attempt(lambda: {speak})") in ("EPERM", "ECONNREFUSED")
    assert there.counted() == 0
    assert target.usable()


@pytest.mark.weakened
def test_on_the_hosts_network_it_is_reached(service: tuple[Service, str], weak_arena: Arena) -> None:
    there, speak = service
    assert weak_arena.target().run(f"attempt(lambda: {speak})") == "worked"
    assert there.counted() == 1
