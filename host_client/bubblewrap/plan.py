"""From a sandbox's specification to what the keeper builds: users, mounts, and the command lines of ``bwrap``.

Two layouts, by who starts it:

- **root**: like a container. PID 1, broker and sessions have users of their own, in a user namespace in which all of
  them are ordinary users of the host; even PID 1 is nobody's root outside.
- **anybody else**: one user, the host's, is all that the kernel gives. So the broker, and the one session with its
  supervisor, are in two sets of namespaces: neither sees the other's processes, files or sockets, but ``guest.sock``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from host_client.bubblewrap import bpf, tree
from host_client.bubblewrap.cgroups import Groups
from host_client.providers.container_spec import GUEST_SOCKET_DIR, HOST_SOCKET_DIR, SHM_BYTES, ContainerSpec
from host_client.runtime_dir import BROKER_UID_FOR_ROOT, UIDS_PER_SANDBOX

#: Whom root inside is outside: nobody else, and below the broker.
SUPERVISOR_UID_FOR_ROOT = BROKER_UID_FOR_ROOT - 1
#: What the kernel calls users from outside of a user namespace.
_OVERFLOW = Path("/proc/sys/kernel/overflowuid")
#: Any folder that is there everywhere: only the sandbox sees what is mounted there.
_STAGE = "/tmp"  # noqa: S108
_APP = "/opt/rlm-sandbox/broker-app"
#: What the engines hide, too.
_COVERED = ("/proc/keys", "/proc/timer_list", "/proc/latency_stats", "/proc/kcore")
_COVERED_FOLDERS = ("/proc/acpi", "/proc/scsi", "/proc/fs")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one sandbox is built.

    Attributes:
        spec: What it is to be; its image is a tree's folder.
        groups: Its control groups.
        log: File for its log.
        exit: File for how it ended.
        bwrap: The program.
    """

    spec: ContainerSpec
    groups: Groups
    log: Path
    exit: Path
    bwrap: str

    @property
    def split(self) -> bool:
        """Whether namespaces take the place of users."""
        return self.spec.isolation.separate_users and os.geteuid() != 0

    def to_json(self) -> str:
        """Return what the keeper reads."""
        isolation = self.spec.isolation
        return json.dumps(
            {
                **self._users(),
                "own_network": isolation.network == "none",
                "stage": _STAGE,
                "mounts": self._mounts(),
                "programs": self._programs(),
                "seccomp": bpf.compiled(isolation.seccomp, isolation.capabilities).hex() if isolation.seccomp else "",
                "cgroup_procs": [str(folder / "cgroup.procs") for folder in self.groups.folders],
                "cgroups": list(map(str, self.groups.folders)),
                "oom_counters": list(map(str, self.groups.counters)),
                "log": str(self.log),
                "exit": str(self.exit),
            }
        )

    def supervisor_config(self) -> str:
        """Return what PID 1 is told."""
        config = self.spec.supervisor_config()
        if os.geteuid() == 0:
            # Root outside has no number inside, like everybody else there; only root and the broker's user come
            # through the folder to its socket.
            config["allowed_host_uids"] = [int(_OVERFLOW.read_text())]
        if self.split:
            for name in ("broker_uid", "broker_gid", "guest_uid_base"):
                del config[name]
            config["one_user"] = True
        return json.dumps(config, separators=(",", ":"))

    def _users(self) -> dict[str, Any]:
        uid, gid = os.geteuid(), os.getegid()
        if uid != 0:
            return {
                "uid_map": [[uid, uid, 1]],
                "gid_map": [[gid, gid, 1]],
                "deny_setgroups": True,
                "become": None,
            }
        base, broker = self.spec.guest_uid_base, self.spec.broker_uid
        mapped = [[0, SUPERVISOR_UID_FOR_ROOT, 1], [broker, broker, 1], [base, base, UIDS_PER_SANDBOX]]
        become = 0 if self.spec.isolation.separate_users else broker
        return {"uid_map": mapped, "gid_map": mapped, "deny_setgroups": False, "become": become}

    def _mounts(self) -> list[dict[str, Any]]:
        """Return what the keeper mounts: sizes and owners that bwrap has no options for, and closed folders."""
        tmpfs = self.spec.tmpfs()
        guest_options = [*tmpfs[GUEST_SOCKET_DIR].split(",")]
        if os.geteuid() != 0:
            # One user, whose it is anyway.
            guest_options = [option for option in guest_options if not option.startswith(("uid=", "gid="))]
        shm = min(SHM_BYTES, self.spec.settings.memory)
        return [
            _tmpfs("tmp", tmpfs["/tmp"].split(",")),  # noqa: S108
            _tmpfs("guest", guest_options),
            _tmpfs("shm", ["rw", "nosuid", "nodev", f"size={shm}", f"nr_inodes={shm // 4096}", "mode=1777"]),
            self._sysfs(),
            _bind("host", self.spec.directory),
            *(_bind(f"tree{i}", bind.source) for i, bind in enumerate(self._binds())),
        ]

    def _sysfs(self) -> dict[str, Any]:
        if self.spec.isolation.network != "none":
            return _bind("sys", Path("/sys"))  # the kernel gives a new one only with a network of one's own
        return {"kind": "sysfs", "name": "sys", "flags": ["ro", "nosuid", "nodev", "noexec"], "options": ""}

    def _binds(self) -> list[tree.Bind]:
        return tree.binds(Path(self.spec.image))

    def _programs(self) -> list[list[str]]:
        config = self.supervisor_config().replace("{", "{{").replace("}", "}}")
        supervisor = ["-s", "-m", "broker.supervisor"]
        if not self.split:
            return [self._bwrap([*supervisor, config], host=True)]
        return [
            self._bwrap([*supervisor, "--broker", "{link}", config], host=True),
            self._bwrap([*supervisor, "--workers", "{link}", config], host=False),
        ]

    def _bwrap(self, command: Sequence[str], *, host: bool) -> list[str]:
        isolation = self.spec.isolation
        words = [self.bwrap, "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--as-pid-1"]
        words += ["--hostname", "sandbox", "--die-with-parent", "--json-status-fd", "{status}", "--cap-drop", "ALL"]
        if isolation.separate_users and not self.split:
            words += [word for name in isolation.capabilities for word in ("--cap-add", f"CAP_{name}")]
        if isolation.seccomp:
            words += ["--seccomp", "{filter}"]
        words += self._file_systems(host=host)
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONPATH": _APP}
        for name, value in {**environment, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}.items():
            words += ["--setenv", name, value]
        return [*words, "--chdir", "/", "--", tree.python_command(), *command]

    def _file_systems(self, *, host: bool) -> list[str]:
        binds, links = self._binds(), tree.links()
        words = _folders([*(bind.target for bind in binds), *links, HOST_SOCKET_DIR, GUEST_SOCKET_DIR])
        for i, bind in enumerate(binds):
            words += ["--ro-bind", f"{_STAGE}/tree{i}", bind.target]
        for path, target in links.items():
            words += ["--symlink", target, path]
        words += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", f"{_STAGE}/sys", "/sys"]
        if self.groups.views:
            words += [] if "/sys/fs/cgroup" in self.groups.views else ["--tmpfs", "/sys/fs/cgroup"]
            for target, folder in self.groups.views.items():
                words += ["--ro-bind", str(folder), target]
        for name, target in (("tmp", "/tmp"), ("shm", "/dev/shm"), ("guest", GUEST_SOCKET_DIR)):  # noqa: S108
            words += ["--bind", f"{_STAGE}/{name}", target]
        if host:
            words += ["--bind", f"{_STAGE}/host", HOST_SOCKET_DIR]
        words += [word for path in _COVERED if Path(path).exists() for word in ("--ro-bind", "/dev/null", path)]
        words += [word for path in _COVERED_FOLDERS if Path(path).is_dir() for word in ("--tmpfs", path)]
        words += [word for path in _COVERED_FOLDERS if Path(path).is_dir() for word in ("--remount-ro", path)]
        return [*words, "--remount-ro", "/dev", "--remount-ro", "/"]


def _folders(targets: Sequence[str]) -> list[str]:
    """Return the options that make the folders above these; left to itself, bwrap makes them for their owner alone."""
    parents = {str(parent) for target in targets for parent in Path(target).parents if parent != Path("/")}
    return [word for parent in sorted(parents) for word in ("--perms", "0755", "--dir", parent)]


def _tmpfs(name: str, options: Sequence[str]) -> dict[str, Any]:
    flags = [option for option in options if option in ("nosuid", "nodev", "noexec")]
    rest = [option for option in options if option not in ("rw", "exec", *flags)]
    return {"kind": "tmpfs", "name": name, "flags": flags, "options": ",".join(rest)}


def _bind(name: str, source: Path) -> dict[str, Any]:
    return {"kind": "bind", "name": name, "source": str(source), "flags": [], "options": ""}
