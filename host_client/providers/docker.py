"""Sandboxes as Docker containers."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from broker.protocol import PROTOCOL_VERSION
from host_client import runtime_dir
from host_client.engine import connect_engine
from host_client.errors import (
    BadSetting,
    BrokerUnreachable,
    ProtocolMismatch,
    ProviderError,
    SandboxError,
    SetupError,
    UnknownSandbox,
)
from host_client.image import image_tag
from host_client.owner import Owner
from host_client.providers.base import SandboxHandle
from host_client.providers.container_spec import (
    LABEL,
    LABEL_DIRECTORY,
    LABEL_HOST_UID,
    LABEL_KIND,
    LABEL_NAME,
    NAMED,
    ContainerSpec,
)
from host_client.providers.docker_engine import ContainerNotFound
from host_client.providers.exits import death_reason, explained, log_tail
from host_client.providers.readiness import Died, DirectoryWatch, NotReady, TimedOut, wait_until_ready
from host_client.reaper import reap, remove_sandbox_directory
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from host_client.transport import UnixSocketTransport

log = logging.getLogger(__name__)

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")


class NameTaken(SetupError):
    """A sandbox of that name is already running."""

    code = "name_taken"


class Engine(Protocol):
    """The part of ``DockerEngine`` that this provider uses; ``fake_engine.FakeEngine`` has it too."""

    def create_container(self, **keywords: Any) -> str:
        """Create a container and return its id."""

    def start(self, container_id: str) -> None:
        """Start it."""

    def inspect(self, container_id: str) -> dict[str, Any]:
        """Return the engine's description of it (by id or name)."""

    def remove(self, container_id: str, force: bool = True) -> None:
        """Kill and remove it; one that is gone is fine."""

    def list(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return all containers that carry these labels."""

    def logs(self, container_id: str, tail: int = 200) -> str:
        """Return the last lines that it wrote."""

    def close(self) -> None:
        """Close the connections."""


class _Process:
    """What one process holds. A forked child begins with an empty one: its parent's sandboxes are not its own."""

    def __init__(self) -> None:
        # Guards engine, users, reaped and exit_hook together: the engine is open while it is used or sandboxes are
        # owned, and is closed, descriptors and all, otherwise.
        self.lock = threading.Lock()
        self.engine: Engine | None = None
        self.users = 0
        self.reaped = False
        self.exit_hook = False
        self.owned: dict[str, SandboxHandle] = {}


class DockerProvider:
    """Starts, finds and stops sandboxes in the container engine. Safe to share between threads and over a fork.

    Owned sandboxes that were not stopped are stopped when the process exits.

    Args:
        connect: Returns an engine that answers, or raises ``EngineUnavailable`` or ``EnginePermission``.
        image_of: Returns the tag of the image for some settings.
    """

    def __init__(
        self,
        *,
        connect: Callable[[], Engine] = connect_engine,
        image_of: Callable[[SandboxSettings], str] = image_tag,
    ) -> None:
        self._connect = connect
        self._image_of = image_of
        self._processes: dict[int, _Process] = {}

    def start(self, settings: SandboxSettings, *, name: str | None = None) -> SandboxHandle:
        """Start a sandbox and return once its broker answers; see ``SandboxProvider.start``.

        Raises:
            SetupError: Engine, permission, image, disk, setting or name (``NameTaken``); nothing was started.
            ProviderError: The engine or the sandbox failed; nothing is left behind.
            ProtocolMismatch: The image speaks another version.
        """
        if sys.platform != "linux":
            raise ProviderError(
                "a Unix socket can be shared with a container only on Linux", help="on Windows, run this inside WSL 2"
            )
        if name is not None:
            check_name(name)
        with self._engine() as engine:
            runtime = RuntimeDir.open()
            self._reap_once(engine, runtime)
            return self._start(engine, runtime, settings, name)

    def find(self, name: str) -> SandboxHandle:
        """Return the running sandbox of that name; see ``SandboxProvider.find``."""
        with self._engine() as engine:
            found = self._named(engine, name)
        if found is None:
            raise UnknownSandbox(f"no sandbox {name!r} is running", help=f"start it: rlm-sandbox up {name}")
        if found["State"] != "running":
            raise UnknownSandbox(f"the sandbox {name!r} has stopped", help=f"start it again: rlm-sandbox up {name}")
        return handle_of(found)

    def why_dead(self, handle: SandboxHandle) -> str | None:
        """Return why a sandbox no longer runs, or None while it runs; see ``SandboxProvider.why_dead``."""
        # A fresh connection, which is bounded by seconds: an engine that hangs would hold the old one for a minute.
        try:
            engine = self._connect()
        except SandboxError:
            return "engine_gone"
        try:
            return death_reason(engine.inspect(handle.sandbox_id)["State"])
        except ContainerNotFound:
            return "removed"
        except SandboxError:
            return "engine_gone"
        finally:
            engine.close()

    def stop(self, handle: SandboxHandle) -> None:
        """Kill and remove a sandbox and all that it holds; see ``SandboxProvider.stop``.

        In a forked child, sandboxes owned by its parent are left alone.
        """
        if self._is_inherited(handle):
            return
        try:
            with self._engine() as engine:
                engine.remove(handle.sandbox_id)
                # Only when the container is gone: its uids and its directory must not be given to another.
                remove_sandbox_directory(handle.socket_path.parent)
                self._process.owned.pop(handle.sandbox_id, None)
        except SandboxError as error:
            log.warning("the sandbox %s could not be removed, a later start will: %s", handle.name, error.message)

    def stop_all_owned(self) -> None:
        """Stop every sandbox that this process started and owns; runs at exit by itself."""
        for handle in list(self._process.owned.values()):
            self.stop(handle)

    def _start(self, engine: Engine, runtime: RuntimeDir, settings: SandboxSettings, name: str | None) -> SandboxHandle:
        owner = Owner.current()
        directory = runtime.create(owner)
        spec = ContainerSpec(
            settings=settings,
            image=self._image_of(settings),
            name=name or secrets.token_hex(4),
            owned=name is None,
            owner=owner.label(),
            directory=directory.path,
            guest_uid_base=directory.guest_uid_base,
            broker_uid=runtime_dir.broker_uid(),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        try:
            with DirectoryWatch(directory.path) as watch:
                container_id = self._create(engine, spec)
                engine.start(container_id)
                self._wait_until_healthy(engine, container_id, spec, watch)
            handle = SandboxHandle(
                sandbox_id=container_id, name=spec.name, socket_path=directory.socket_path, owned=spec.owned
            )
            if handle.owned:
                self._own(handle)
            return handle
        except BaseException as error:
            # Ctrl-C may strike while the engine already creates it: by name, then, and only if it is this one.
            _remove_if_same(engine, spec)
            runtime.remove(directory.path.name)
            if isinstance(error, ProviderError):
                raise explained(error, settings) from error
            raise

    def _create(self, engine: Engine, spec: ContainerSpec) -> str:
        with contextlib.suppress(_Conflict):
            return _create_or_conflict(engine, spec)
        taken = self._named(engine, spec.name)
        if taken is not None and taken["State"] == "running":
            raise NameTaken(
                f"a sandbox {spec.name!r} is already running", help=f"stop it first: rlm-sandbox down {spec.name}"
            )
        if taken is not None:
            # It ended by itself, or never started: nobody uses it.
            engine.remove(taken["Id"])
            remove_sandbox_directory(handle_of(taken).socket_path.parent)
        return _create_or_conflict(engine, spec)

    def _wait_until_healthy(
        self, engine: Engine, container_id: str, spec: ContainerSpec, watch: DirectoryWatch
    ) -> None:
        timeout_s = spec.settings.start_timeout_s
        try:
            health = wait_until_ready(
                lambda left_s: _probe(spec.directory / runtime_dir.SOCKET_NAME, left_s),
                watch=watch,
                pid=engine.inspect(container_id)["State"].get("Pid"),
                is_running=lambda: death_reason(engine.inspect(container_id)["State"]) is None,
                timeout_s=timeout_s,
            )
        except Died:
            reason = death_reason(engine.inspect(container_id)["State"])
            raise ProviderError(
                f"the sandbox ended while it started: {reason}{log_tail(engine.logs(container_id))}"
            ) from None
        except TimedOut:
            raise ProviderError(
                f"the sandbox did not answer within {timeout_s:g} s{log_tail(engine.logs(container_id))}",
                help="a slow machine? Give it more time: RLM_SANDBOX_START_TIMEOUT_S=120",
            ) from None
        if health.get("protocol") != PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"the image {spec.image} speaks protocol {health.get('protocol')!r}, this package {PROTOCOL_VERSION}",
                help="rebuild the image: rlm-sandbox image",
            )

    @staticmethod
    def _named(engine: Engine, name: str) -> dict[str, Any] | None:
        labels = {LABEL: "1", LABEL_KIND: NAMED, LABEL_NAME: name, LABEL_HOST_UID: str(os.geteuid())}
        found = engine.list(labels)
        return found[0] if found else None

    @property
    def _process(self) -> _Process:
        return self._processes.setdefault(os.getpid(), _Process())

    def _is_inherited(self, handle: SandboxHandle) -> bool:
        mine = os.getpid()
        return any(handle.sandbox_id in held.owned for pid, held in self._processes.items() if pid != mine)

    def _own(self, handle: SandboxHandle) -> None:
        process = self._process
        process.owned[handle.sandbox_id] = handle
        with process.lock:
            first, process.exit_hook = not process.exit_hook, True
        if first:
            _at_exit(self.stop_all_owned)

    def _reap_once(self, engine: Engine, runtime: RuntimeDir) -> None:
        process = self._process
        with process.lock:
            first, process.reaped = not process.reaped, True
        if first:
            reap(engine, runtime)

    @contextlib.contextmanager
    def _engine(self) -> Iterator[Engine]:
        process = self._process
        with process.lock:
            if process.engine is None:
                process.engine = self._connect()
            engine = process.engine
            process.users += 1
        try:
            yield engine
        finally:
            with process.lock:
                process.users -= 1
                if not process.users and not process.owned:
                    process.engine = None
                    engine.close()


def check_name(name: str) -> None:
    """Refuse what cannot be a sandbox's name.

    Raises:
        BadSetting: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise BadSetting(
            f"{name!r} cannot be the name of a sandbox", help="use up to 63 letters, digits, '_', '.' and '-'"
        )


def handle_of(container: Mapping[str, Any]) -> SandboxHandle:
    """Return the handle for an entry of the engine's list."""
    labels = container["Labels"]
    return SandboxHandle(
        sandbox_id=container["Id"],
        name=labels[LABEL_NAME],
        socket_path=Path(labels[LABEL_DIRECTORY]) / runtime_dir.SOCKET_NAME,
        owned=labels[LABEL_KIND] != NAMED,
    )


class _Conflict(Exception):
    """A container of that name exists."""


def _create_or_conflict(engine: Engine, spec: ContainerSpec) -> str:
    try:
        return engine.create_container(**spec.keywords())
    except ProviderError as error:
        if not spec.owned and "already in use" in error.message:
            raise _Conflict from error
        raise


def _remove_if_same(engine: Engine, spec: ContainerSpec) -> None:
    try:
        found = engine.inspect(spec.container_name)
        if found["Config"]["Labels"].get(LABEL_DIRECTORY) == str(spec.directory):
            engine.remove(found["Id"])
    except ContainerNotFound:
        pass
    except SandboxError as error:
        log.warning("the container %s may be left over: %s", spec.container_name, error.message)


def _probe(socket_path: Path, left_s: float) -> dict[str, Any]:
    transport = UnixSocketTransport(socket_path)
    try:
        return transport.request("GET", "/v1/health", timeout_s=left_s).header
    except BrokerUnreachable as error:
        raise NotReady(error.message) from error
    finally:
        transport.close()


def _at_exit(stop: Callable[[], None]) -> None:
    """Run ``stop`` when this process exits; children of ``multiprocessing`` skip ``atexit``."""
    util = sys.modules.get("multiprocessing.util")
    process = sys.modules.get("multiprocessing.process")
    if util is not None and process is not None and process.parent_process() is not None:
        util.Finalize(None, stop, exitpriority=0)
    else:
        atexit.register(stop)
