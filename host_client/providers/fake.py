"""A provider for tests: hands out the socket of a broker that runs in the test's own process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

from host_client.errors import UnknownSandbox
from host_client.providers.base import SandboxHandle
from host_client.settings import SandboxSettings


class RunningBroker(Protocol):
    """What this needs of ``broker.testing.InProcessBroker``."""

    host_socket: Path

    @property
    def ended(self) -> bool:
        """Whether it has ended."""


class FakeProvider:
    """A ``SandboxProvider`` whose sandboxes are all one broker, which the test starts and stops.

    Sandboxes that it starts are not owned by the interpreter, so that their session is closed and the broker goes on.

    Args:
        broker: A running broker.

    Attributes:
        started: How many sandboxes were started.
    """

    def __init__(self, broker: RunningBroker) -> None:
        self._broker = broker
        # Guards started.
        self._lock = threading.Lock()
        self.started = 0

    def start(self, settings: SandboxSettings, *, name: str | None = None) -> SandboxHandle:
        """See ``SandboxProvider.start``."""
        with self._lock:
            self.started += 1
        return self._handle(name or "in-process")

    def find(self, name: str) -> SandboxHandle:
        """See ``SandboxProvider.find``; every name is known but ``missing``."""
        if name == "missing":
            raise UnknownSandbox(f"no running sandbox is called {name!r}", help=f"start it: rlm-sandbox up {name}")
        return self._handle(name)

    def reachable(self, address: str) -> list[SandboxHandle]:
        """See ``SandboxProvider.reachable``."""
        return [] if self._broker.ended else [self._handle("in-process")]

    def adopt(self, handle: SandboxHandle) -> None:
        """See ``SandboxProvider.adopt``; the broker is the test's."""

    def disown(self, handle: SandboxHandle) -> None:
        """See ``SandboxProvider.disown``; the broker is the test's."""

    def why_dead(self, handle: SandboxHandle) -> str | None:
        """See ``SandboxProvider.why_dead``."""
        return "removed" if self._broker.ended else None

    def stop(self, handle: SandboxHandle) -> None:
        """See ``SandboxProvider.stop``; the broker is the test's."""

    def _handle(self, name: str) -> SandboxHandle:
        return SandboxHandle(
            sandbox_id=f"fake:{self._broker.host_socket}", name=name, socket_path=self._broker.host_socket, owned=False
        )
