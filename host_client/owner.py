"""Who started a sandbox: an identity that tells a living process from a later one that got the same pid."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

_PROC = Path("/proc")
#: In /proc/<pid>/stat, counted from the field after the command's closing parenthesis: ``starttime`` is field 22.
_START_TICKS_FIELD = 22 - 3
_LABEL_PARTS = 4
_FILE_NAME = re.compile(r"([0-9a-f]{8})-([0-9a-f]{1,16})-([0-9a-f]{1,16})-([0-9a-f]{1,16})-")
#: How much of the boot id tells boots apart.
BOOT_ID_CHARS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """A process, unmistakably.

    Attributes:
        boot_id: The kernel's random id of this boot: pids and ticks begin anew after a reboot.
        pid: Process id.
        start_ticks: When it started, in clock ticks since boot.
        pid_namespace: Inode of the pid namespace in which ``pid`` means something.
    """

    boot_id: str
    pid: int
    start_ticks: int
    pid_namespace: int

    @classmethod
    def current(cls) -> Owner:
        """Return the identity of the calling process (Linux only: it reads ``/proc``)."""
        pid = os.getpid()
        ticks = _start_ticks(pid)
        return cls(boot_id=_boot_id(), pid=pid, start_ticks=ticks or 0, pid_namespace=_pid_namespace())

    @classmethod
    def of(cls, pid: int) -> Owner:
        """Return the identity of a process that runs.

        Raises:
            LookupError: No such process runs.
        """
        ticks = _start_ticks(pid)
        if ticks is None:
            raise LookupError(f"no process {pid} runs")
        return cls(boot_id=_boot_id(), pid=pid, start_ticks=ticks, pid_namespace=_pid_namespace())

    @classmethod
    def parse(cls, label: str) -> Owner | None:
        """Read what ``label`` wrote; None for anything else."""
        parts = label.split(":")
        if len(parts) != _LABEL_PARTS or not all(part.isdigit() for part in parts[1:]):
            return None
        return cls(parts[0], int(parts[1]), int(parts[2]), int(parts[3]))

    def label(self) -> str:
        """Return ``<boot id>:<pid>:<start ticks>:<pid namespace>``."""
        return f"{self.boot_id}:{self.pid}:{self.start_ticks}:{self.pid_namespace}"

    def file_name(self) -> str:
        """Return a short form for the beginning of a file's name."""
        return f"{self.boot_id[:BOOT_ID_CHARS]}-{self.pid:x}-{self.start_ticks:x}-{self.pid_namespace:x}"

    @classmethod
    def from_file_name(cls, name: str) -> Owner | None:
        """Read the owner off a name that begins with ``file_name()``; None for anything else."""
        match = _FILE_NAME.match(name)
        if match is None:
            return None
        return cls(match[1], int(match[2], 16), int(match[3], 16), int(match[4], 16))

    def is_dead(self) -> bool:
        """Tell whether the process is certainly gone; False where that cannot be seen from here."""
        # The beginning of the random id is enough; names of directories hold no more of it.
        if self.boot_id[:BOOT_ID_CHARS] != _boot_id()[:BOOT_ID_CHARS]:
            return True
        if self.pid_namespace != _pid_namespace():
            return False
        return _start_ticks(self.pid) != self.start_ticks


def _boot_id() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> int:
    return os.stat(_PROC / "self/ns/pid").st_ino


def _start_ticks(pid: int) -> int | None:
    """Return when a process started, or None where no such process runs (a zombie no longer does)."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command may hold spaces and parentheses; only its last parenthesis counts.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[_START_TICKS_FIELD])
