"""The seam between the interpreter and whatever starts sandboxes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

from host_client.settings import SandboxSettings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SandboxHandle:
    """A running sandbox.

    Attributes:
        sandbox_id: The provider's id (for Docker: the container's id).
        name: Its name, such as ``default`` for the one that ``make sandbox-up`` starts.
        socket_path: The broker's ``host.sock``.
        owned: Whether it ends with the process that started it.
    """

    sandbox_id: str
    name: str
    socket_path: Path
    owned: bool


class SandboxProvider(Protocol):
    """Starts, finds and stops sandboxes. Implementations are safe to share between threads."""

    def start(self, settings: SandboxSettings, *, name: str | None = None) -> SandboxHandle:
        """Start a sandbox and return once its socket answers.

        Args:
            settings: Limits and image.
            name: Keep it running under this name after this process ends; None for one that this process owns.

        Raises:
            SetupError: Engine, image or setting; nothing was started.
            ProviderError: The engine failed; nothing is left behind.
        """

    def find(self, name: str) -> SandboxHandle:
        """Return the running sandbox of that name.

        Raises:
            UnknownSandbox: There is none.
        """

    def why_dead(self, handle: SandboxHandle) -> str | None:
        """Return why a sandbox no longer runs, or None while it runs.

        One of ``oom``, ``killed``, ``crashed(SIGNAL)``, ``exited(N)``, ``removed``, ``engine_gone``.
        """

    def stop(self, handle: SandboxHandle) -> None:
        """Kill and remove the sandbox and its socket directory. Idempotent; never raises for one that is gone."""
