"""Sandboxes as Docker containers."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator

from host_client.endings import wait_for_endings
from host_client.engine import connect_engine
from host_client.errors import ForeignSession, ProviderError, SandboxError, UnknownSandbox
from host_client.image import image_tag
from host_client.providers.base import SandboxHandle
from host_client.providers.container_spec import EXEC, LABEL, LABEL_HOST_UID, LABEL_NAME
from host_client.providers.docker_engine import ContainerNotFound
from host_client.providers.engine_api import Engine
from host_client.providers.exec_tunnel import Lines, exec_transport
from host_client.providers.exits import death_reason
from host_client.providers.isolation import Isolation
from host_client.providers.launch import check_name, find_named, handle_of, launch
from host_client.providers.owned import Owned
from host_client.providers.self_test import engine_limits, require
from host_client.providers.transport_choice import TransportChoice, choose_transport
from host_client.reaper import reap, remove_sandbox_directory
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from host_client.transport import SocketTransport, Transport, UnixSocketTransport

log = logging.getLogger(__name__)


class _Process:
    """What one process holds. A forked child begins with an empty one: its parent's sandboxes are not its own."""

    def __init__(self, connect: Callable[[], Engine]) -> None:
        self.lines = Lines(connect)
        # By sandbox: what was opened at its start, for whoever connects to it first.
        self.opened: dict[str, SocketTransport] = {}
        # By setting, what it came to with this engine.
        self.transports: dict[str, TransportChoice] = {}
        # Guards engine and users together: the engine's connections are open only while somebody uses it. Also guards
        # the flags.
        self.lock = threading.Lock()
        self.engine: Engine | None = None
        self.users = 0
        self.reaped = False
        self.engine_is_fit = False
        self.owned = Owned()
        # One for each sandbox that is being stopped: who stops it too returns no earlier than it is gone.
        self.stopping: dict[str, threading.Lock] = {}


class DockerProvider:
    """Starts, finds and stops sandboxes in the container engine. Safe to share between threads and over a fork.

    Owned sandboxes that were not stopped are stopped when the process exits.

    Args:
        connect: Returns an engine that answers, or raises ``EngineUnavailable`` or ``EnginePermission``.
        image_of: Returns the tag of the image for some settings.
        open_runtime: Returns this user's runtime directory.
        isolation_of: Returns what stands between generated code and the machine; tests of attacks weaken it.
    """

    #: Containers are started ahead of time and ended in the background.
    is_slow = True

    def __init__(
        self,
        *,
        connect: Callable[[], Engine] = connect_engine,
        image_of: Callable[[SandboxSettings], str] = image_tag,
        open_runtime: Callable[[], RuntimeDir] = RuntimeDir.open,
        isolation_of: Callable[[SandboxSettings], Isolation] = Isolation.of,
    ) -> None:
        self._connect = connect
        self._image_of = image_of
        self._open_runtime = open_runtime
        self._isolation_of = isolation_of
        self._processes: dict[int, _Process] = {}

    def start(self, settings: SandboxSettings, *, name: str | None = None) -> SandboxHandle:
        """Start a sandbox and return once its broker answers; see ``SandboxProvider.start``.

        Raises:
            SetupError: Engine, permission, image, disk, setting or name (``NameTaken``); nothing was started.
            SandboxTooWeak: It, or the engine, does not hold what was asked for; nothing is left behind.
            ProviderError: The engine or the sandbox failed; nothing is left behind.
            ProtocolMismatch: The image speaks another version.
        """
        if sys.platform != "linux":
            raise ProviderError(
                "the host's side of sandboxes needs Linux; the engine may be anywhere",
                help="on Windows, run this inside WSL 2",
            )
        if name is not None:
            check_name(name)
        isolation = self._isolation_of(settings)
        with self._engine() as engine:
            runtime = self._open_runtime()
            self._reap_once(engine, runtime)
            transport = self._look_at_engine_once(engine, settings, isolation)
            image = self._image_of(settings)

            def launched(transport: TransportChoice) -> tuple[SandboxHandle, SocketTransport]:
                return launch(
                    engine,
                    runtime,
                    settings,
                    image=image,
                    name=name,
                    isolation=isolation,
                    own=self._own,
                    transport=transport,
                    lines=self._process.lines,
                )

            try:
                handle, opened = launched(transport)
            except SandboxError as error:
                handle, opened = launched(self._decide(settings, transport.after(error)))
        if handle.transport == EXEC:
            self._process.opened[handle.sandbox_id] = opened
        else:
            opened.close()
        return handle

    def transport(self, handle: SandboxHandle) -> Transport:
        """Return what carries requests to a sandbox's broker; see ``connected_sandbox.transport_to``."""
        if handle.transport != EXEC:
            return UnixSocketTransport(handle.socket_path)
        opened = self._process.opened.pop(handle.sandbox_id, None)
        return opened or exec_transport(self._process.lines.to(handle.sandbox_id))

    def choose_transport(self, settings: SandboxSettings) -> TransportChoice:
        """Return how brokers are reached with these settings and this engine.

        Raises:
            SandboxError: The engine does not answer.
        """
        with self._engine() as engine:
            return self._transport_of(engine, settings)

    def find(self, name: str) -> SandboxHandle:
        """Return the running sandbox of that name; see ``SandboxProvider.find``."""
        with self._engine() as engine:
            found = find_named(engine, name)
        if found is None:
            raise UnknownSandbox(f"no sandbox {name!r} is running", help=f"to start it: rlm-sandbox up {name}")
        if found["State"] not in ("running", "paused"):
            raise UnknownSandbox(f"the sandbox {name!r} has stopped", help=f"to start it again: rlm-sandbox up {name}")
        return handle_of(found)

    def reachable(self, address: str) -> list[SandboxHandle]:
        """Return this user's running sandboxes; see ``SandboxProvider.reachable``."""
        with self._engine() as engine:
            running = [each for each in engine.list({LABEL: "1"}) if each["State"] in ("running", "paused")]
        mine = [each for each in running if each["Labels"].get(LABEL_HOST_UID) == str(os.geteuid())]
        handles = [handle_of(each) for each in mine]
        wanted = {address, address.rpartition("/")[0]}
        if not any(handle.name in wanted or handle.sandbox_id in wanted for handle in handles):
            for other in running:
                if other not in mine and (other["Labels"].get(LABEL_NAME) in wanted or other["Id"] in wanted):
                    raise ForeignSession(f"the sandbox that {address!r} names belongs to another user")
        return handles

    def adopt(self, handle: SandboxHandle) -> None:
        """Stop a sandbox at this process's exit that another process owned; see ``SandboxProvider.adopt``."""
        if handle.owned:
            self._own(handle)

    def disown(self, handle: SandboxHandle) -> None:
        """Leave a sandbox alone at this process's exit; see ``SandboxProvider.disown``."""
        self._process.owned.drop(handle.sandbox_id)
        self._close_opened(handle)

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
        process = self._process
        try:
            with process.stopping.setdefault(handle.sandbox_id, threading.Lock()), self._engine() as engine:
                engine.remove(handle.sandbox_id)
                process.lines.close(handle.sandbox_id)
                self._close_opened(handle)
                # Only when the container is gone: its uids and its directory must not be given to another.
                remove_sandbox_directory(handle.socket_path.parent)
                process.owned.drop(handle.sandbox_id)
                process.stopping.pop(handle.sandbox_id, None)
        except SandboxError as error:
            log.warning("the sandbox %s could not be removed, a later start will: %s", handle.name, error.message)

    def stop_all_owned(self) -> None:
        """Stop every sandbox that this process started and owns; runs at exit by itself."""
        # First: of a session that was let go it may still have to be asked whether another client holds it.
        wait_for_endings()
        for handle in self._process.owned.handles():
            self.stop(handle)

    @property
    def _process(self) -> _Process:
        return self._processes.get(os.getpid()) or self._processes.setdefault(os.getpid(), _Process(self._connect))

    def _is_inherited(self, handle: SandboxHandle) -> bool:
        mine = os.getpid()
        return any(handle.sandbox_id in held.owned for pid, held in self._processes.items() if pid != mine)

    def _own(self, handle: SandboxHandle) -> None:
        self._process.owned.add(handle, self.stop_all_owned)

    def _reap_once(self, engine: Engine, runtime: RuntimeDir) -> None:
        process = self._process
        with process.lock:
            first, process.reaped = not process.reaped, True
        if first:
            reap(engine, runtime)

    def _close_opened(self, handle: SandboxHandle) -> None:
        opened = self._process.opened.pop(handle.sandbox_id, None)
        if opened is not None:
            opened.close()

    def _look_at_engine_once(self, engine: Engine, settings: SandboxSettings, isolation: Isolation) -> TransportChoice:
        """Refuse an engine that would drop a limit without a word; one that may be used is not asked again."""
        process = self._process
        if not process.engine_is_fit and isolation.enforced:
            require(engine_limits(engine.info()), enforced=True)
            process.engine_is_fit = True
        return self._transport_of(engine, settings)

    def _transport_of(self, engine: Engine, settings: SandboxSettings) -> TransportChoice:
        known = self._process.transports.get(settings.transport)
        return known or self._decide(settings, choose_transport(settings, engine.url, engine.info()))

    def _decide(self, settings: SandboxSettings, choice: TransportChoice) -> TransportChoice:
        """Keep a decision, and say it where it is not the ordinary one."""
        self._process.transports[settings.transport] = choice
        log.log(logging.INFO if choice.name == EXEC else logging.DEBUG, "transport %s: %s", choice.name, choice.why)
        return choice

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
                if not process.users:
                    # The SDK keeps a connection for each path it has asked for; asking again opens them anew.
                    engine.close()
