"""From settings to a healthy container, or to nothing at all."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from broker.protocol import PROTOCOL_VERSION
from broker.protocol.directory_watch import DirectoryWatch
from broker.protocol.self_test import Check
from host_client import runtime_dir
from host_client.errors import (
    BadSetting,
    BrokerUnreachable,
    ProtocolMismatch,
    ProviderError,
    SandboxError,
    SetupError,
    TransportUnusable,
)
from host_client.owner import Owner
from host_client.providers.base import SandboxHandle
from host_client.providers.container_spec import (
    LABEL,
    LABEL_DIRECTORY,
    LABEL_HOST_UID,
    LABEL_KIND,
    LABEL_NAME,
    LABEL_TRANSPORT,
    NAMED,
    SOCKET,
    ContainerSpec,
)
from host_client.providers.docker_engine import ContainerNotFound
from host_client.providers.engine_api import Engine
from host_client.providers.exec_tunnel import Lines, RelayEnded, exec_transport
from host_client.providers.exits import death_reason, explained, log_tail
from host_client.providers.isolation import Isolation
from host_client.providers.readiness import Died, NotReady, TimedOut, wait_until_ready
from host_client.providers.self_test import judged, require
from host_client.providers.transport_choice import TransportChoice, not_shared
from host_client.reaper import remove_directory
from host_client.runtime_dir import RuntimeDir, SandboxDirectory
from host_client.settings import SandboxSettings
from host_client.transport import BrokerTimeout, SocketTransport, Transport, UnixSocketTransport

log = logging.getLogger(__name__)

#: What a broker logs once it can be reached.
SERVING = '"serving"'
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")


class NameTaken(SetupError):
    """A sandbox of that name is already running."""

    code = "name_taken"


def launch(
    engine: Engine,
    runtime: RuntimeDir,
    settings: SandboxSettings,
    *,
    image: str,
    name: str | None,
    isolation: Isolation,
    own: Callable[[SandboxHandle], None],
    transport: TransportChoice,
    lines: Lines,
) -> tuple[SandboxHandle, SocketTransport]:
    """Start a sandbox; return it, and what its broker answered on, which is open.

    Args:
        engine: Runs it.
        runtime: Where its socket will be.
        settings: Limits.
        image: Tag of the image.
        name: None for an owned sandbox.
        isolation: What stands between generated code and the machine.
        own: Told of an owned sandbox, so that none is ever without somebody to stop it.
        transport: How the broker is reached.
        lines: This process's, through relays.

    Raises:
        SetupError: The image is missing, the disk full, a setting impossible, the name taken.
        TransportUnusable: The broker cannot be reached in this way; nothing is left behind.
        PreloadFailed: A module that was to be preloaded cannot be imported; nothing is left behind.
        SandboxTooWeak: It started, but does not hold what was asked for; nothing is left behind.
        ProviderError: The engine or the sandbox failed; nothing is left behind.
        ProtocolMismatch: The image speaks another version.
    """
    owner = Owner.current()
    directory = runtime.create(owner)
    spec = _spec(settings, image, name, owner, directory, isolation, transport.name)
    way: SocketTransport | None = None
    try:
        with DirectoryWatch(directory.path) as watch:
            container_id = _create(engine, spec)
            engine.start(container_id)
            shared = transport.name == SOCKET
            way = UnixSocketTransport(directory.socket_path) if shared else exec_transport(lines.to(container_id))
            _wait_until_healthy(engine, container_id, spec, watch, way)
            require(self_test(way, settings, isolation), enforced=isolation.enforced)
        handle = SandboxHandle(
            sandbox_id=container_id,
            name=spec.name,
            socket_path=directory.socket_path,
            owned=spec.owned,
            transport=spec.transport,
        )
        if handle.owned:
            own(handle)
        return handle, way
    except BaseException as error:
        if way is not None:
            way.close()
        # Ctrl-C may strike while the engine already creates it: by name, then, and only if it is this one.
        _remove_if_same(engine, spec)
        runtime.remove(directory.path.name)
        if isinstance(error, ProviderError):
            raise explained(error, settings) from error
        raise


def self_test(transport: Transport, settings: SandboxSettings, isolation: Isolation) -> list[Check]:
    """Return what a running sandbox found out about itself, judged by what was asked for.

    Args:
        transport: Leads to its broker; stays open.
        settings: What was asked for.
        isolation: What was asked for.

    Raises:
        ProviderError: It does not answer.
        MalformedReply: It answers nonsense.
        PreloadFailed: A module that was to be preloaded cannot be imported.
    """
    try:
        reply = transport.request("GET", "/v1/self-test", timeout_s=settings.start_timeout_s).header
    except BrokerTimeout as error:
        preloads = f" and importing {', '.join(settings.preload)}" if settings.preload else ""
        raise ProviderError(
            f"the sandbox was not done with its self-test{preloads} within {settings.start_timeout_s:g} s",
            help="a slow machine? Give it more time: RLM_SANDBOX_START_TIMEOUT_S=120",
        ) from error
    except BrokerUnreachable as error:
        raise ProviderError(f"the sandbox ended during its self-test: {error.message}") from error
    return judged(reply, settings, isolation)


def check_name(name: str) -> None:
    """Refuse what cannot be a sandbox's name.

    Raises:
        BadSetting: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise BadSetting(
            f"{name!r} cannot be the name of a sandbox", help="use up to 63 letters, digits, '_', '.' and '-'"
        )


def find_named(engine: Engine, name: str) -> dict[str, Any] | None:
    """Return the engine's list entry of this user's named sandbox, running or not, or None."""
    labels = {LABEL: "1", LABEL_KIND: NAMED, LABEL_NAME: name, LABEL_HOST_UID: str(os.geteuid())}
    found = engine.list(labels)
    return found[0] if found else None


def handle_of(container: Mapping[str, Any]) -> SandboxHandle:
    """Return the handle for an entry of the engine's list."""
    labels = container["Labels"]
    return SandboxHandle(
        sandbox_id=container["Id"],
        name=labels[LABEL_NAME],
        socket_path=Path(labels[LABEL_DIRECTORY]) / runtime_dir.SOCKET_NAME,
        owned=labels[LABEL_KIND] != NAMED,
        transport=labels.get(LABEL_TRANSPORT, SOCKET),
    )


def _spec(
    settings: SandboxSettings,
    image: str,
    name: str | None,
    owner: Owner,
    directory: SandboxDirectory,
    isolation: Isolation,
    transport: str,
) -> ContainerSpec:
    return ContainerSpec(
        settings=settings,
        image=image,
        name=name or secrets.token_hex(4),
        owned=name is None,
        owner=owner.label(),
        directory=directory.path,
        guest_uid_base=directory.guest_uid_base,
        broker_uid=runtime_dir.broker_uid(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        isolation=isolation,
        transport=transport,
    )


class _Conflict(Exception):
    """A container of that name exists."""


def _create(engine: Engine, spec: ContainerSpec) -> str:
    with contextlib.suppress(_Conflict):
        return _create_or_conflict(engine, spec)
    taken = find_named(engine, spec.name)
    if taken is not None and taken["State"] == "running":
        raise NameTaken(f"a sandbox {spec.name!r} is already running", help=f"to stop it: rlm-sandbox down {spec.name}")
    if taken is not None:
        # It ended by itself, or never started: nobody uses it.
        engine.remove(taken["Id"])
        remove_directory(taken)
    try:
        return _create_or_conflict(engine, spec)
    except _Conflict:
        raise NameTaken(f"somebody else starts a sandbox {spec.name!r} right now") from None


def _create_or_conflict(engine: Engine, spec: ContainerSpec) -> str:
    try:
        return engine.create_container(**spec.keywords())
    except ProviderError as error:
        if not spec.owned and "already in use" in error.message:
            raise _Conflict from error
        raise


def _wait_until_healthy(
    engine: Engine, container_id: str, spec: ContainerSpec, watch: DirectoryWatch, way: SocketTransport
) -> None:
    timeout_s = spec.settings.start_timeout_s

    def is_running() -> bool:
        return death_reason(engine.inspect(container_id)["State"]) is None

    try:
        if spec.transport == SOCKET:
            pid = engine.inspect(container_id)["State"].get("Pid")
            health = wait_until_ready(
                lambda left_s: probe(way, left_s), watch=watch, pid=pid, is_running=is_running, timeout_s=timeout_s
            )
        else:
            health = _relayed_health(way, timeout_s, is_running)
    except Died:
        reason = death_reason(engine.inspect(container_id)["State"])
        raise ProviderError(
            f"the sandbox ended while it started: {reason}{log_tail(engine.logs(container_id))}"
        ) from None
    except TimedOut as late:
        if spec.transport == SOCKET and SERVING in engine.logs(container_id):
            raise not_shared(spec.name) from None
        raise ProviderError(
            f"the sandbox did not answer within {timeout_s:g} s ({late}){log_tail(engine.logs(container_id))}",
            help="a slow machine? Give it more time: RLM_SANDBOX_START_TIMEOUT_S=120",
        ) from None
    if health.get("protocol") != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the image {spec.image} speaks protocol {health.get('protocol')!r}, this package {PROTOCOL_VERSION}",
            help="rebuild the image: rlm-sandbox image",
        )


def _relayed_health(way: SocketTransport, timeout_s: float, is_running: Callable[[], bool]) -> dict[str, Any]:
    """Return a sandbox's health through its relay, which waits inside for the broker to come up."""
    try:
        with way.dial(timeout_s):
            return probe(way, timeout_s)
    except TimeoutError:
        raise TimedOut("its relay says nothing") from None
    except (RelayEnded, NotReady) as error:
        if not is_running():
            raise Died from None
        raise TransportUnusable(
            f"transport='exec': no relay runs in the sandbox: {error}",
            help="RLM_SANDBOX_TRANSPORT=socket, where the engine is on this machine",
        ) from error


def probe(transport: Transport, left_s: float) -> dict[str, Any]:
    """Return a sandbox's health.

    Raises:
        NotReady: It does not answer yet.
    """
    try:
        return transport.request("GET", "/v1/health", timeout_s=left_s).header
    except BrokerUnreachable as error:
        raise NotReady(error.message) from error


def _remove_if_same(engine: Engine, spec: ContainerSpec) -> None:
    try:
        found = engine.inspect(spec.container_name)
        if found["Config"]["Labels"].get(LABEL_DIRECTORY) == str(spec.directory):
            engine.remove(found["Id"])
    except ContainerNotFound:
        pass
    except SandboxError as error:
        log.warning("the container %s may be left over: %s", spec.container_name, error.message)
