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
        transport: ``socket``, or ``exec`` where ``socket_path`` is only what names its directory.
    """

    sandbox_id: str
    name: str
    socket_path: Path
    owned: bool
    transport: str = "socket"


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

    def reachable(self, address: str) -> list[SandboxHandle]:
        """Return this user's running sandboxes, whoever started them: where a session to attach to may be.

        Args:
            address: What is looked for, so that a sandbox of another user can be named as such.

        Raises:
            ForeignSession: It names a sandbox of another user.
        """

    def adopt(self, handle: SandboxHandle) -> None:
        """Note that a sandbox which another process owned ends with this one from now on; a named one does not."""

    def disown(self, handle: SandboxHandle) -> None:
        """Note that a sandbox is another process's now: it does not end with this one."""

    def why_dead(self, handle: SandboxHandle) -> str | None:
        """Return why a sandbox no longer runs, or None while it runs.

        One of ``oom``, ``killed``, ``crashed(SIGNAL)``, ``exited(N)``, ``removed``, ``engine_gone``.
        """

    def stop(self, handle: SandboxHandle) -> None:
        """Kill and remove the sandbox and its socket directory. Idempotent; never raises for one that is gone."""
