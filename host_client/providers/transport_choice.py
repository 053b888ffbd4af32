"""Which transport ``transport="auto"`` means with this engine, and why: a socket file works within one kernel only."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

from host_client.errors import ProviderError, SandboxError, TransportUnusable
from host_client.providers.container_spec import EXEC, SOCKET
from host_client.settings import SandboxSettings

log = logging.getLogger(__name__)

_UNIX = "unix://"


@dataclasses.dataclass(frozen=True, slots=True)
class TransportChoice:
    """A decision.

    Attributes:
        name: ``socket`` or ``exec``.
        why: In words.
        forced: Whether the user decided.
    """

    name: str
    why: str
    forced: bool = False

    def after(self, error: SandboxError) -> TransportChoice:
        """Return what to try next, after a sandbox could not be started.

        Raises:
            TransportUnusable: Nothing else, because this one was asked for.
            SandboxError: The same error: it has another cause.
        """
        if self.name != SOCKET or not isinstance(error, ProviderError) or not is_unseen(error):
            raise error
        if self.forced:
            raise TransportUnusable(
                f"setting transport='socket': the engine does not see this machine's files ({error.message})",
                help="RLM_SANDBOX_TRANSPORT=exec, or auto",
            ) from error
        return TransportChoice(EXEC, "the engine does not see this machine's files")


def choose_transport(
    settings: SandboxSettings, url: str, info: Mapping[str, Any], *, kernel: str | None = None
) -> TransportChoice:
    """Return the transport for these settings and this engine.

    Args:
        settings: ``transport``.
        url: Where the engine was found.
        info: Its description of itself.
        kernel: Release of this machine's kernel; asked for if not given.
    """
    if settings.transport != "auto":
        return TransportChoice(settings.transport, f"transport={settings.transport!r} was asked for", forced=True)
    system, its_kernel = str(info.get("OperatingSystem", "")), str(info.get("KernelVersion", ""))
    kernel = os.uname().release if kernel is None else kernel
    if url and not url.startswith((_UNIX, "http+unix://")):
        return TransportChoice(EXEC, f"the engine is reached at {url}, where it may be on another machine")
    if "desktop" in system.lower():
        return TransportChoice(EXEC, f"the engine is {system}, which runs in a virtual machine")
    if its_kernel and its_kernel != kernel:
        return TransportChoice(EXEC, f"the engine runs on another kernel ({its_kernel}, here {kernel})")
    return TransportChoice(SOCKET, "the engine runs on this machine's kernel")


def is_unseen(error: SandboxError) -> bool:
    """Say whether the engine refused a mount because it has no such directory."""
    return "bind source path does not exist" in error.message.lower()


def not_shared(name: str) -> TransportUnusable:
    """Return the error for a broker that serves a socket which this machine does not see."""
    return TransportUnusable(
        f"the broker in the sandbox {name!r} serves, but its socket does not appear in the directory that is shared "
        "with it: the engine has other files than this machine",
        help="RLM_SANDBOX_TRANSPORT=exec",
    )
