"""Sandboxes without a container engine: Linux namespaces, set up with bubblewrap. See decision 015."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from host_client.bubblewrap.launch import launch
from host_client.bubblewrap.program import find_bwrap
from host_client.bubblewrap.records import Records
from host_client.bubblewrap.tree import existing_tree
from host_client.endings import wait_for_endings
from host_client.errors import BadSetting, ProviderError, SandboxError, UnknownSandbox
from host_client.owner import Owner
from host_client.providers.base import SandboxHandle
from host_client.providers.isolation import Isolation
from host_client.providers.launch import check_name
from host_client.providers.owned import Owned
from host_client.reaper import in_use_by_its_broker
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings

log = logging.getLogger(__name__)


class _Process:
    """What one process holds. A forked child begins with an empty one: its parent's sandboxes are not its own."""

    def __init__(self) -> None:
        # Guards the flag.
        self.lock = threading.Lock()
        self.reaped = False
        self.owned = Owned()
        # Our children: they must be waited for, or stay as zombies.
        self.keepers: dict[str, subprocess.Popen[bytes]] = {}
        # One for each sandbox that is being stopped: who stops it too returns no earlier than it is gone.
        self.stopping: dict[str, threading.Lock] = {}


class BubblewrapProvider:
    """Starts, finds and stops sandboxes made of namespaces. Safe to share between threads and over a fork.

    Owned sandboxes that were not stopped are stopped when the process exits.

    Args:
        open_runtime: Returns this user's runtime directory.
        tree_of: Returns the folder with a sandbox's files.
        isolation_of: Returns what stands between generated code and the machine; tests of attacks weaken it.
    """

    #: Sandboxes are started ahead of time and ended in the background.
    is_slow = True

    def __init__(
        self,
        *,
        open_runtime: Callable[[], RuntimeDir] = RuntimeDir.open,
        tree_of: Callable[[SandboxSettings], Path] = existing_tree,
        isolation_of: Callable[[SandboxSettings], Isolation] = Isolation.of,
    ) -> None:
        self._open_runtime = open_runtime
        self._tree_of = tree_of
        self._isolation_of = isolation_of
        self._processes: dict[int, _Process] = {}

    def start(self, settings: SandboxSettings, *, name: str | None = None) -> SandboxHandle:
        """Start a sandbox and return once its broker answers; see ``SandboxProvider.start``.

        Raises:
            SetupError: bubblewrap, files, setting or name (``NameTaken``); nothing was started.
            SandboxTooWeak: It does not hold what was asked for; nothing is left behind.
            ProviderError: It did not start; nothing is left behind.
        """
        if sys.platform != "linux":
            raise ProviderError("namespaces are Linux's", help="on Windows, run this inside WSL 2")
        if name is not None:
            check_name(name)
        isolation = self._isolation_of(settings)
        settings = adapted(settings, isolation)
        tree = self._tree_of(settings)
        bwrap = find_bwrap()
        runtime = self._open_runtime()
        self._reap_once(runtime)
        made = launch(runtime, settings, tree=tree, bwrap=bwrap, name=name, isolation=isolation, own=self._own)
        self._process.keepers[made.handle.sandbox_id] = made.keeper
        return made.handle

    def find(self, name: str) -> SandboxHandle:
        """Return the running sandbox of that name; see ``SandboxProvider.find``."""
        records = self._records()
        found = records.named(name)
        if found is None:
            raise UnknownSandbox(f"no sandbox {name!r} is running", help=f"to start it: rlm-sandbox up {name}")
        if not found.runs:
            raise UnknownSandbox(f"the sandbox {name!r} has stopped", help=f"to start it again: rlm-sandbox up {name}")
        return records.handle(found)

    def reachable(self, address: str) -> list[SandboxHandle]:
        """Return this user's running sandboxes; see ``SandboxProvider.reachable``. Other users' are not to be seen."""
        records = self._records()
        return [records.handle(record) for record in records.all() if record.runs]

    def adopt(self, handle: SandboxHandle) -> None:
        """Stop a sandbox at this process's exit that another process owned; see ``SandboxProvider.adopt``."""
        if not handle.owned:
            return
        records = self._records()
        record = records.read(handle.sandbox_id)
        if record is not None:
            records.write(dataclasses.replace(record, owner=Owner.current().label()))
        self._own(handle)

    def disown(self, handle: SandboxHandle) -> None:
        """Leave a sandbox alone at this process's exit; see ``SandboxProvider.disown``."""
        self._process.owned.drop(handle.sandbox_id)

    def why_dead(self, handle: SandboxHandle) -> str | None:
        """Return why a sandbox no longer runs, or None while it runs; see ``SandboxProvider.why_dead``."""
        return self._records_of(handle).why_dead(handle.sandbox_id)

    def stop(self, handle: SandboxHandle) -> None:
        """Kill and remove a sandbox and all that it holds; see ``SandboxProvider.stop``.

        In a forked child, sandboxes owned by its parent are left alone.
        """
        if self._is_inherited(handle):
            return
        process = self._process
        try:
            with process.stopping.setdefault(handle.sandbox_id, threading.Lock()):
                records = self._records_of(handle)
                record = records.read(handle.sandbox_id)
                if record is not None:
                    records.remove(record)
                keeper = process.keepers.pop(handle.sandbox_id, None)
                if keeper is not None:
                    keeper.wait()
                process.owned.drop(handle.sandbox_id)
                process.stopping.pop(handle.sandbox_id, None)
        except (SandboxError, OSError) as error:
            log.warning("the sandbox %s could not be removed, a later start will: %s", handle.name, error)

    def stop_all_owned(self) -> None:
        """Stop every sandbox that this process started and owns; runs at exit by itself."""
        # First: of a session that was let go it may still have to be asked whether another client holds it.
        wait_for_endings()
        for handle in self._process.owned.handles():
            self.stop(handle)

    @property
    def _process(self) -> _Process:
        return self._processes.setdefault(os.getpid(), _Process())

    def _is_inherited(self, handle: SandboxHandle) -> bool:
        mine = os.getpid()
        return any(handle.sandbox_id in held.owned for pid, held in self._processes.items() if pid != mine)

    def _own(self, handle: SandboxHandle) -> None:
        self._process.owned.add(handle, self.stop_all_owned)

    def _reap_once(self, runtime: RuntimeDir) -> None:
        process = self._process
        with process.lock:
            first, process.reaped = not process.reaped, True
        if first:
            Records(runtime).reap(in_use=in_use_by_its_broker)

    def _records(self) -> Records:
        return Records(self._open_runtime())

    def _records_of(self, handle: SandboxHandle) -> Records:
        # It may be in another runtime directory than today's: the variable can change between two runs.
        return Records(RuntimeDir(handle.socket_path.parent.parent))


def adapted(settings: SandboxSettings, isolation: Isolation) -> SandboxSettings:
    """Return the settings that namespaces can hold.

    Raises:
        BadSetting: One of them needs a container engine.
    """
    if settings.runtime is not None:
        raise BadSetting(
            f"setting runtime={settings.runtime!r}: the bubblewrap provider has no runtimes",
            help="unset RLM_SANDBOX_RUNTIME, or RLM_SANDBOX_PROVIDER=docker",
        )
    if settings.network and isolation.enforced:
        raise BadSetting(
            "setting network=True: without an engine there is no bridge, only the host's own network with all that "
            "listens on it",
            help="use RLM_SANDBOX_PROVIDER=docker; or, to open it all the same: RLM_SANDBOX_INSECURE=1",
        )
    if os.geteuid() != 0 and isolation.separate_users and settings.max_sessions != 1:
        # Only users keep sessions apart, and there is one.
        return dataclasses.replace(settings, max_sessions=1)
    return settings
