"""Clears away what processes of this user left behind when they were killed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from host_client.errors import SandboxError
from host_client.owner import Owner
from host_client.providers.container_spec import (
    EXEC,
    LABEL,
    LABEL_DIRECTORY,
    LABEL_HOST_UID,
    LABEL_KIND,
    LABEL_OWNER,
    LABEL_TRANSPORT,
    OWNED,
)
from host_client.providers.engine_api import Engine
from host_client.providers.exec_tunnel import Line, exec_transport
from host_client.runtime_dir import SOCKET_NAME, RuntimeDir
from host_client.transport import Transport, UnixSocketTransport

#: A living broker answers in a millisecond; one that is frozen holds nothing worth waiting for.
_ASK_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)


def reap(engine: Engine, runtime: RuntimeDir) -> list[str]:
    """Remove this user's owned containers, directories and uid reservations whose owner process is dead.

    Living siblings, other users and named sandboxes are spared; so is an orphan that somebody attached to, or that has
    a session with a name, to which somebody may attach before it ends by itself.

    Args:
        engine: Lists and removes.
        runtime: This user's runtime directory.

    Returns:
        Ids of the containers that were removed.

    Raises:
        SandboxError: The engine does not list its containers.
    """
    # Directories before containers: of a process dead by now, every container there will ever be is in the list.
    # The other way round, a named sandbox started in between would lose its directory.
    abandoned = runtime.abandoned()
    removed, in_use = [], set()
    for container in engine.list({LABEL: "1", LABEL_HOST_UID: str(os.geteuid())}):
        if is_orphan(container) and not _spared(container, engine) and _remove(engine, container["Id"]):
            removed.append(container["Id"])
            remove_directory(container)
        else:
            in_use.add(Path(container["Labels"].get(LABEL_DIRECTORY, "")).name)
    for name in abandoned:
        if name not in in_use:
            runtime.remove(name)
    return removed


def is_orphan(container: Mapping[str, Any]) -> bool:
    """Tell whether an entry of the engine's list is an owned sandbox whose owner is certainly dead."""
    labels = container["Labels"]
    owner = Owner.parse(labels.get(LABEL_OWNER, ""))
    return labels.get(LABEL_KIND) == OWNED and owner is not None and owner.is_dead()


def remove_directory(container: Mapping[str, Any]) -> None:
    """Remove the directory and the reservation that a container's label names, where they are this user's."""
    remove_sandbox_directory(Path(container["Labels"].get(LABEL_DIRECTORY, "")))


def remove_sandbox_directory(path: Path) -> None:
    """Remove a sandbox's directory and reservation, in whichever runtime directory; leave anything else alone."""
    # It may be in another runtime directory than today's: the variable can change between two runs.
    if Owner.from_file_name(path.name) is None or not path.parent.is_dir():
        return
    try:
        RuntimeDir(path.parent).remove(path.name)
    except SandboxError as error:
        log.warning("the socket directory %s stays: %s", path, error.message)


def in_use_by_its_broker(directory: Path) -> bool:
    """Ask a sandbox's broker whether a host is connected to it, or a session of it has a name."""
    return _in_use(UnixSocketTransport(directory / SOCKET_NAME))


def _in_use(transport: Transport) -> bool:
    try:
        connections = transport.request("GET", "/v1/health", timeout_s=_ASK_TIMEOUT_S).header.get("connections")
        sessions = transport.request("GET", "/v1/sessions", timeout_s=_ASK_TIMEOUT_S).header.get("sessions")
    except SandboxError:
        return False
    finally:
        transport.close()
    others = isinstance(connections, int) and connections > 1  # one is this question's
    named = isinstance(sessions, list) and any(isinstance(each, dict) and each.get("name") for each in sessions)
    return others or named


def _spared(container: Mapping[str, Any], engine: Engine) -> bool:
    directory = container["Labels"].get(LABEL_DIRECTORY, "")
    if container.get("State") != "running" or not directory:
        return False
    if container["Labels"].get(LABEL_TRANSPORT) == EXEC:
        return _in_use(exec_transport(Line(container["Id"], lambda: engine).use()))
    return in_use_by_its_broker(Path(directory))


def _remove(engine: Engine, container_id: str) -> bool:
    try:
        engine.remove(container_id)
    except SandboxError as error:
        # Somebody else's orphan must not keep this process from starting its own sandbox.
        log.warning("an orphaned container stays: %s", error.message)
        return False
    log.info("removed the orphaned container %s", container_id[:12])
    return True
