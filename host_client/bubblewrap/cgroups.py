"""Control groups for sandboxes: memory, processes and cores of all of one sandbox together; version 1 or 2."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from host_client.settings import SandboxSettings

log = logging.getLogger(__name__)

_PARENT = "rlm-sandbox"
_CONTROLLERS = ("memory", "pids", "cpu")
_CPU_PERIOD_US = 100_000
_MOUNTS = Path("/proc/self/mountinfo")


@dataclasses.dataclass(frozen=True, slots=True)
class Groups:
    """The control groups of one sandbox.

    Attributes:
        folders: Where they are: one, or with version 1 one for each controller.
        views: By where the sandbox sees it, the folder that it sees there.
    """

    folders: tuple[Path, ...] = ()
    views: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def counters(self) -> list[Path]:
        """Files that say how often something in it was killed for lack of memory."""
        return [folder / name for folder in self.folders for name in ("memory.events", "memory.oom_control")]

    def remove(self) -> None:
        """Remove them; what still has processes stays."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def create(name: str, settings: SandboxSettings, mounts: Path = _MOUNTS) -> Groups:
    """Make a sandbox's control groups; none at all where this user may not, which the self-test then finds out.

    Args:
        name: Unique on this machine.
        settings: The limits.
        mounts: The kernel's table of mounts.
    """
    made: list[Path] = []
    try:
        unified, by_controller = _hierarchies(mounts)
        if all(name in by_controller for name in _CONTROLLERS):
            return _version_1(name, settings, by_controller, made)
        if unified is not None:
            return _version_2(name, settings, unified, made)
    except OSError as error:
        log.debug("no control groups: %s", error)
        Groups(tuple(made)).remove()
    return Groups()


def command_prefix(settings: SandboxSettings, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the command that starts a program with these limits for an ordinary user, or nothing.

    Only the user's own systemd may put its processes into a group below its own; it does so on request.
    """
    program = shutil.which("systemd-run", path=environ.get("PATH"))
    runtime = environ.get("XDG_RUNTIME_DIR")
    if os.geteuid() == 0 or program is None or not runtime or not Path(runtime, "systemd", "private").exists():
        return []
    limits = {
        "MemoryMax": settings.memory,
        "MemorySwapMax": 0,
        "TasksMax": settings.pids,
        "CPUQuota": f"{settings.cpus * 100:g}%",
    }
    properties = [f"--property={name}={value}" for name, value in limits.items()]
    return [program, "--user", "--scope", "--quiet", "--collect", *properties, "--"]


def _version_1(name: str, settings: SandboxSettings, mounted: Mapping[str, Path], made: list[Path]) -> Groups:
    views = {}
    for controller, values in _values_1(settings).items():
        folder = mounted[controller] / _PARENT / name
        # Two controllers may be mounted together.
        if folder not in made:
            folder.mkdir(parents=True)
            made.append(folder)
        for file, value in values.items():
            # Without swap accounting there is no such file; the self-test says whether that matters.
            if not file.startswith("memory.memsw") or (folder / file).exists():
                (folder / file).write_text(str(value))
        views[f"/sys/fs/cgroup/{controller}"] = folder
    return Groups(tuple(made), views)


def _values_1(settings: SandboxSettings) -> dict[str, dict[str, object]]:
    return {
        "memory": {
            "memory.limit_in_bytes": settings.memory,
            "memory.memsw.limit_in_bytes": settings.memory,
        },
        "pids": {"pids.max": settings.pids},
        "cpu": {"cpu.cfs_period_us": _CPU_PERIOD_US, "cpu.cfs_quota_us": int(_cpus(settings) * _CPU_PERIOD_US)},
    }


def _version_2(name: str, settings: SandboxSettings, mounted: Path, made: list[Path]) -> Groups:
    parent = mounted / _PARENT
    parent.mkdir(exist_ok=True)
    for folder in (mounted, parent):
        missing = set(_CONTROLLERS) - set((folder / "cgroup.subtree_control").read_text().split())
        if missing:
            (folder / "cgroup.subtree_control").write_text(" ".join(f"+{each}" for each in sorted(missing)))
    folder = parent / name
    folder.mkdir()
    made.append(folder)
    (folder / "memory.max").write_text(str(settings.memory))
    (folder / "pids.max").write_text(str(settings.pids))
    (folder / "cpu.max").write_text(f"{int(_cpus(settings) * _CPU_PERIOD_US)} {_CPU_PERIOD_US}")
    with contextlib.suppress(FileNotFoundError):  # without swap accounting
        (folder / "memory.swap.max").write_text("0")
    return Groups((folder,), {"/sys/fs/cgroup": folder})


def _cpus(settings: SandboxSettings) -> float:
    return min(settings.cpus, os.cpu_count() or settings.cpus)


def _hierarchies(mounts: Path) -> tuple[Path | None, dict[str, Path]]:
    """Return where version 2 is mounted, and where each controller of version 1 is."""
    unified, by_controller = None, {}
    for path, kind, options in _cgroup_mounts(mounts):
        if kind == "cgroup2":
            unified = path
        else:
            by_controller.update({name: path for name in _CONTROLLERS if name in options})
    return unified, by_controller


def _cgroup_mounts(mounts: Path) -> Iterator[tuple[Path, str, list[str]]]:
    for line in mounts.read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        if kind in ("cgroup", "cgroup2"):
            yield Path(before.split()[4]), kind, options.split()[-1].split(",")
