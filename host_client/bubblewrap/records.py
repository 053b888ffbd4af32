"""Which sandboxes of this user there are without an engine to ask: a file for each, beside the sockets' directories.

::

    <runtime dir>/bubblewrap/<id>.json   who owns it, its processes, its control groups
                             <id>.exit   how it ended, written by its keeper
                             <id>.log    its newest lines (and <id>.log.1)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from host_client.owner import Owner
from host_client.providers.base import SandboxHandle
from host_client.providers.exits import death_reason
from host_client.runtime_dir import RECORDS, SOCKET_NAME, RuntimeDir

#: What is killed ends in milliseconds; a process that is stuck in the kernel may take longer.
_END_LIMIT_S = 10.0
#: The kernel gives a control group up a moment after its last process, and tells nobody.
_GROUP_TRIES, _GROUP_PAUSE_S = 200, 0.01

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One sandbox.

    Attributes:
        sandbox_id: Name of its directory.
        name: The sandbox's.
        owned: Whether it ends with its owner.
        owner: Label of the process that it ends with.
        created: When, as ISO 8601 text.
        tree: Folder with its files.
        keeper: Label of its keeper.
        processes: Labels of the processes that it consists of, their builder last; the end of one is its end.
        groups: Its control groups.
        max_sessions: Most sessions in it.
    """

    sandbox_id: str
    name: str
    owned: bool
    owner: str
    created: str
    tree: str
    keeper: str = ""
    processes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    max_sessions: int = 1

    @property
    def runs(self) -> bool:
        """Whether all of it is alive."""
        owners = [Owner.parse(label) for label in self.processes]
        return bool(owners) and all(owner is not None and not owner.is_dead() for owner in owners)

    @property
    def abandoned(self) -> bool:
        """Whether it should have ended with a process that is certainly gone."""
        owner = Owner.parse(self.owner)
        return self.owned and owner is not None and owner.is_dead()

    def kill(self) -> None:
        """Kill every process of it, and wait until the keeper has cleared up."""
        *first, builder = self.processes or ("",)
        for label in first:
            _kill(label)
        if not _wait_for(self.keeper, _END_LIMIT_S):
            _kill(builder)
            _wait_for(self.keeper, _END_LIMIT_S)


class Records:
    """The records of one runtime directory.

    Args:
        runtime: The directory.
    """

    def __init__(self, runtime: RuntimeDir) -> None:
        self._runtime = runtime
        self._folder = runtime.path / RECORDS
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def file(self, sandbox_id: str, suffix: str) -> Path:
        """Return where something of a sandbox is: ``json``, ``exit``, ``log``."""
        return self._folder / f"{sandbox_id}.{suffix}"

    def socket_path(self, record: Record) -> Path:
        """Return a sandbox's ``host.sock``."""
        return self._runtime.path / record.sandbox_id / SOCKET_NAME

    def handle(self, record: Record) -> SandboxHandle:
        """Return a sandbox's handle."""
        return SandboxHandle(
            sandbox_id=record.sandbox_id, name=record.name, socket_path=self.socket_path(record), owned=record.owned
        )

    def write(self, record: Record) -> None:
        """Keep a record; readers see the old one or the new one."""
        unborn = self.file(record.sandbox_id, f"json-{os.getpid()}")
        unborn.write_text(json.dumps(dataclasses.asdict(record)))
        unborn.replace(self.file(record.sandbox_id, "json"))

    def read(self, sandbox_id: str) -> Record | None:
        """Return a record, or None where there is none that can be read."""
        try:
            data = json.loads(self.file(sandbox_id, "json").read_text())
            return Record(**{**data, "processes": tuple(data["processes"]), "groups": tuple(data["groups"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def all(self) -> list[Record]:
        """Return every record, oldest first."""
        found = [self.read(path.stem) for path in self._folder.glob("*.json")]
        return sorted((record for record in found if record is not None), key=lambda record: record.created)

    def named(self, name: str) -> Record | None:
        """Return the record of a named sandbox, running or not."""
        return next((record for record in self.all() if record.name == name and not record.owned), None)

    def why_dead(self, sandbox_id: str) -> str | None:
        """Return why a sandbox no longer runs, or None while it runs."""
        record = self.read(sandbox_id)
        if record is None:
            return "removed"
        if record.runs:
            return None
        # Its keeper sees the end a moment after it, and says how it was.
        _wait_for(record.keeper, 1.0)
        try:
            return death_reason(json.loads(self.file(sandbox_id, "exit").read_text()))
        except (OSError, ValueError):
            return "killed"

    def log_text(self, sandbox_id: str) -> str:
        """Return the newest lines of a sandbox's log."""
        text = ""
        for suffix in ("log.1", "log"):
            with contextlib.suppress(OSError):
                text += self.file(sandbox_id, suffix).read_text("utf-8", "replace")
        return text

    def remove(self, record: Record) -> None:
        """Kill what is left of a sandbox, and remove its directory, its uids, its control groups and its record."""
        record.kill()
        for folder in record.groups:
            _remove_group(folder)
        self.forget(record.sandbox_id)

    def forget(self, sandbox_id: str) -> None:
        """Remove a sandbox's directory, its uids and its files."""
        self._runtime.remove(sandbox_id)
        # The record last: as long as it is there, somebody can find the rest.
        for suffix in ("exit", "exit.new", "log", "log.1", "json"):
            self.file(sandbox_id, suffix).unlink(missing_ok=True)

    def reap(self, spared: Sequence[str] = (), *, in_use: Any = None) -> list[str]:
        """Remove owned sandboxes whose owner is dead, unless somebody uses them; return their ids.

        Args:
            spared: Ids that are left alone.
            in_use: Tells by its directory whether a running one is used by somebody else.
        """
        removed = []
        for record in self.all():
            if not record.abandoned or record.sandbox_id in spared:
                continue
            if record.runs and in_use is not None and in_use(self.socket_path(record).parent):
                continue
            self.remove(record)
            removed.append(record.sandbox_id)
        return removed


def labels(pids: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the labels of the processes that a keeper announced."""
    return tuple(Owner.of(pid).label() for pid in (*pids["pids"], pids["builder"]))


def _remove_group(folder: str) -> None:
    """Remove a control group; where its keeper was killed, its last processes may still be on their way out."""
    for _ in range(_GROUP_TRIES):
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(_GROUP_PAUSE_S)
        else:
            return
    log.warning("the control group %s stays", folder)


def _kill(label: str) -> None:
    """Kill a process, and no later one with its number."""
    owner = Owner.parse(label)
    if owner is None:
        return
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(owner.pid)
        try:
            # The descriptor is of whoever has the number now; that it is still the same one is looked at afterwards.
            if not owner.is_dead():
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


def _wait_for(label: str, timeout_s: float) -> bool:
    """Wait for a process's end; tell whether it came."""
    owner = Owner.parse(label)
    if owner is None or owner.is_dead():
        return True
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(owner.pid)
        try:
            if not owner.is_dead():
                select.select([fd], [], [], timeout_s)
        finally:
            os.close(fd)
    return owner.is_dead()
