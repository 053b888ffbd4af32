"""Ends what is left of a session: its processes first, then its files."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterator
from typing import Protocol

from broker.supervisor.config import SupervisorConfig
from broker.supervisor.confinement import WRITABLE_FOLDERS


class Sweeper(Protocol):
    """Kills the processes of a slot and removes its files. ``leaders`` are the pids of its workers.

    Attributes:
        takes_zygote: Whether the zygote is killed with them.
    """

    takes_zygote: bool

    def kill(self, slot: int, leaders: Collection[int]) -> None:
        """Send SIGKILL to every process of the slot."""

    def anything_left(self, slot: int, leaders: Collection[int]) -> bool:
        """Tell whether a process of the slot still lives."""

    def remove_files(self, slot: int) -> None:
        """Remove the slot's files. Runs in a child of its own, which ends afterwards."""


class UidSweeper:
    """Each slot has a uid of its own, so the kernel finds its processes, however they hid."""

    takes_zygote = False

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config

    def kill(self, slot: int, leaders: Collection[int]) -> None:
        """Send SIGKILL to every process of the slot's uid, in one step that no fork can slip through.

        Done without a child, which a fork bomb could keep from starting. The effective uid is the guest's, so that
        the kernel lets us kill the guest's processes and no others; the real one is the sweeper's, so that they
        cannot kill us; the saved one stays 0, to come back.
        """
        uid = self._config.guest_uid(slot)
        os.setresuid(self._config.sweeper_uid(slot), uid, 0)
        try:
            if os.geteuid() == uid and uid != 0:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(-1, signal.SIGKILL)
        finally:
            os.setresuid(0, 0, 0)

    def anything_left(self, slot: int, leaders: Collection[int]) -> bool:
        """Tell whether a process of the slot's uid still lives."""
        uid = str(self._config.guest_uid(slot)).encode()
        return any(uid in uids for uids in _uids_of_processes())

    def remove_files(self, slot: int) -> None:
        """Remove what belongs to the slot's uid."""
        uid = self._config.guest_uid(slot)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        for folder in WRITABLE_FOLDERS:
            remove_owned(folder, uid)


class NamespaceSweeper:
    """Everything in this pid namespace but PID 1, which sweeps, is the one session's.

    The zygote too: it has the session's user, who may have lowered its limits or stopped it. The next one gets another.
    """

    takes_zygote = True

    def kill(self, slot: int, leaders: Collection[int]) -> None:
        """Send SIGKILL to every process but this one."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(-1, signal.SIGKILL)

    def anything_left(self, slot: int, leaders: Collection[int]) -> bool:
        """Tell whether another process still lives."""
        return sum(1 for _ in _uids_of_processes()) > 1

    def remove_files(self, slot: int) -> None:
        """Remove whatever was made."""
        for folder in WRITABLE_FOLDERS:
            remove_owned(folder, os.geteuid())


class GroupSweeper:
    """For tests without root: all sessions share the caller's uid, so only the workers' own groups are ended."""

    takes_zygote = False

    def kill(self, slot: int, leaders: Collection[int]) -> None:
        """Send SIGKILL to the workers' process groups."""
        for pid in leaders:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def anything_left(self, slot: int, leaders: Collection[int]) -> bool:
        """Tell whether a process of these groups still lives."""
        for pid in leaders:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, 0)
                return True
        return False

    def remove_files(self, slot: int) -> None:
        """Remove the private folders that workers of this slot made."""
        for folder in WRITABLE_FOLDERS:
            remove_owned(folder, os.geteuid(), prefix=f"session-{slot}-{os.getppid()}-")


def remove_owned(folder: str, uid: int, *, prefix: str = "") -> None:
    """Remove everything directly in ``folder`` that belongs to ``uid``, with all that is inside."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            with contextlib.suppress(OSError):
                if entry.name.startswith(prefix) and entry.stat(follow_symlinks=False).st_uid == uid:
                    _remove(entry.path, folder)


def _remove(path: str, folder: str) -> None:
    """Remove a file or a tree of any depth: folders inside are moved up first, so that no path grows too long."""
    pending, moved = [path], 0
    while pending:
        current = pending.pop()
        with contextlib.suppress(OSError):
            for inside in _emptied(current):
                moved += 1
                up = os.path.join(folder, f".swept-{os.getpid()}-{moved}")
                with contextlib.suppress(OSError):
                    os.chmod(inside, 0o700)  # moving a folder takes the right to write in it
                    os.rename(inside, up)
                    pending.append(up)
            os.rmdir(current)


def _emptied(path: str) -> list[str]:
    """Unlink a file, or the files of a folder; return the folders inside."""
    with contextlib.suppress(IsADirectoryError):
        os.unlink(path)
        return []
    os.chmod(path, 0o700)
    with os.scandir(path) as entries:
        inside = list(entries)
    for entry in inside:
        if not entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):
                os.unlink(entry.path)
    return [entry.path for entry in inside if entry.is_dir(follow_symlinks=False)]


def _uids_of_processes() -> Iterator[tuple[bytes, ...]]:
    """Yield the real, effective, saved and file uid of every process that is no zombie."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/status", "rb") as status:
                lines = status.read().split(b"\n")
        except OSError:
            continue
        fields = dict(line.split(b":", 1) for line in lines if line.startswith((b"State", b"Uid")))
        if not fields.get(b"State", b"Z").strip().startswith((b"Z", b"X")):
            yield tuple(fields.get(b"Uid", b"").split())
