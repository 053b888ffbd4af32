"""Which provider ``provider="auto"`` means on this machine, and saying so: never silently the weaker one."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import socket

from host_client.machine import Machine
from host_client.providers.base import SandboxProvider
from host_client.settings import SandboxSettings

log = logging.getLogger(__name__)

DOCKER, BUBBLEWRAP = "docker", "bubblewrap"
#: A local socket takes a connection at once, or nobody is there.
_KNOCK_TIMEOUT_S = 1.0
_WEAKER = "weaker in some points, which docs/security.md lists"


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A decision.

    Attributes:
        name: ``docker`` or ``bubblewrap``.
        why: In words.
    """

    name: str
    why: str


def choose(settings: SandboxSettings, machine: Machine | None = None) -> Choice:
    """Return the provider for these settings; nothing is installed or started.

    Args:
        settings: ``provider``, and what only an engine can do.
        machine: Where ``bwrap`` is looked for.
    """
    if settings.provider != "auto":
        return Choice(settings.provider, f"provider={settings.provider!r} was asked for")
    from host_client.providers.docker_engine import DEFAULT_SOCKET, engine_url

    url = engine_url()
    if engine_is_needed(settings):
        return Choice(DOCKER, "image, runtime and network need a container engine")
    if url != DEFAULT_SOCKET:
        return Choice(DOCKER, f"the engine at {url} was named")
    if _somebody_listens(DEFAULT_SOCKET.removeprefix("unix://")):
        return Choice(DOCKER, "an engine answers")
    if (machine or Machine()).which("bwrap") is not None:
        return Choice(BUBBLEWRAP, "no container engine answers this user, and bubblewrap is here")
    return Choice(DOCKER, "there is neither an engine nor bubblewrap")


def engine_is_needed(settings: SandboxSettings) -> bool:
    """Say whether something was asked for that only an engine has, or that names the engine to use."""
    return bool(settings.image or settings.runtime or settings.network or os.environ.get("DOCKER_HOST"))


def provider_for(settings: SandboxSettings) -> SandboxProvider:
    """Return a provider for these settings; its package is imported only now."""
    choice = choose(settings)
    if choice.name == BUBBLEWRAP:
        from host_client.providers.bubblewrap import BubblewrapProvider

        _say_once(choice)
        return BubblewrapProvider()
    from host_client.providers.docker import DockerProvider

    return DockerProvider()


@functools.cache
def _say_once(choice: Choice) -> None:
    """Log that there is no container around the code; once, for programs start hundreds of sandboxes."""
    users = "users of their own" if os.geteuid() == 0 else "one user, apart by namespaces"
    log.warning("sandboxes are made with bubblewrap (%s): %s, %s", choice.why, users, _WEAKER)


def _somebody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knocking:
        knocking.settimeout(_KNOCK_TIMEOUT_S)
        try:
            knocking.connect(path)
        except OSError:  # nobody, or somebody who does not take this user
            return False
    return True
