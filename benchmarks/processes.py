"""What processes cost: memory and CPU time, read from outside them (Linux)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Who spends: the process that calls ``execute``, the daemon between, and the process that runs generated code.
ROLES = ("host", "broker", "worker")
Processes = dict[str, list[int]]

# From linux/posix-timers.h: a process' clock is named by its negated id, and this is the scheduler's own count.
_CPUCLOCK_SCHED = 2


def cpu_ns(pid: int) -> int:
    """Return the CPU time that a process has used, all of its threads, ended ones too, in nanoseconds.

    It is the POSIX CPU clock of the process: ``/proc/PID/stat`` counts ticks of 10 ms, and ``/proc/PID/schedstat``
    knows the first thread only.
    """
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)


def used_ns(processes: Processes) -> dict[str, int]:
    """Return the CPU time of each role in nanoseconds; a process that has ended counts as nothing."""
    return {role: sum(_cpu_or_nothing(pid) for pid in pids) for role, pids in processes.items()}


def _cpu_or_nothing(pid: int) -> int:
    try:
        return cpu_ns(pid)
    except OSError:
        return 0


def tree(root: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    todo = [root]
    while todo:
        pid = todo.pop()
        yield pid
        with contextlib.suppress(OSError):  # it has just ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]


def sandbox_roles(supervisor: int) -> Processes:
    """Tell the processes of one sandbox apart; its supervisor, which sleeps, is counted with the broker."""
    found: Processes = {"broker": [supervisor], "worker": []}
    for pid in tree(supervisor):
        if pid != supervisor:
            found["broker" if "broker" in _arguments(pid) else "worker"].append(pid)
    return found


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def pss_bytes(pids: Iterable[int]) -> int:
    """Return the proportional set size of processes in bytes: pages shared by n processes count as one n-th each."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def available_bytes() -> int:
    """Return the memory that this machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
