"""Builds one sandbox around ``bwrap`` and stays beside it: ``python3 -I -S keeper.py <plan on stdin``.

A program of its own, because namespaces are entered by a process without threads. Standard library only, imported by
nobody; ``plan.py`` writes what it reads. It stays for as long as the sandbox lives, keeps the end of its log (as bytes,
never looked into), and writes down how it ended. ::

    keeper                      the host user
    └ builder                   new user, mount, net, ipc and uts namespaces; mounts what bwrap cannot
      └ bwrap ... supervisor    new pid and cgroup namespaces, its own root; PID 1 inside

With one user for all (see ``plan.py``) the builder stays, and starts two of these: the broker's and the sessions'.
On stdout: one line of JSON with the pids, once bwrap has made its processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x40000000,
)  # fmt: skip
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
#: Two files of this size hold the newest lines.
_LOG_BYTES = 512 << 10
_READ_BYTES = 64 << 10
#: Exit status of a sandbox that never was.
_NOT_BUILT = 70
#: The kernel gives a control group up a moment after its last process.
_CGROUP_TRIES, _CGROUP_PAUSE_S = 200, 0.01

Plan = dict[str, Any]

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    encoded = [os.fsencode(text) for text in (source, target, kind, options)]
    _checked(_libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount {kind or 'bind'} {target}")


def _die_with_parent() -> None:
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)), "prctl")


# The builder.


def _build(plan: Plan, mapped: _Shared, link: socket.socket) -> NoReturn:
    """Become what bwrap is to start from, and let it start; never returns."""
    _die_with_parent()
    for path in plan["cgroup_procs"]:
        with open(path, "w") as procs:
            procs.write("0")
    own_network = _CLONE_NEWNET if plan["own_network"] else 0
    kinds = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWUTS | own_network
    _checked(_libc.unshare(kinds), "unshare (user namespaces)")
    link.send(b"1")
    link.recv(1)  # the keeper has mapped our users
    if not mapped.value:
        os._exit(1)
    # Opened while we still are the host's user: afterwards, folders that only that one may enter are closed to us.
    sources = [
        os.open(mount["source"], os.O_PATH | os.O_CLOEXEC) if mount["kind"] == "bind" else -1
        for mount in plan["mounts"]
    ]
    _become(plan["become"])
    if own_network:
        _raise_loopback()
    _stage(plan, sources)
    _start(plan)


def _become(user: int | None) -> None:
    if user is not None:
        with contextlib.suppress(PermissionError):
            os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        _die_with_parent()  # the change of user took it back


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))


def _stage(plan: Plan, sources: Sequence[int]) -> None:
    """Mount what bwrap has no options for, where it can bind it from; nobody outside sees it."""
    stage = plan["stage"]
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", stage, "tmpfs", _FLAGS["nosuid"] | _FLAGS["nodev"], "mode=755,size=64k")
    os.umask(0o022)
    for mount, fd in zip(plan["mounts"], sources, strict=True):
        target = f"{stage}/{mount['name']}"
        flags = sum(_FLAGS[flag] for flag in mount["flags"])
        if mount["kind"] == "bind" and not os.path.isdir(f"/proc/self/fd/{fd}"):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        else:
            os.mkdir(target)
        if mount["kind"] == "bind":
            _mount(f"/proc/self/fd/{fd}", target, "", _MS_BIND | _MS_REC)
            os.close(fd)
            continue
        try:
            _mount(mount["kind"], target, mount["kind"], flags, mount["options"])
        except OSError:
            if mount["kind"] != "sysfs":
                raise
            # Nested in something that hides parts of it, the kernel gives no new one; then there is an empty folder.
            os.makedirs(f"{target}/fs/cgroup")


def _start(plan: Plan) -> NoReturn:
    os.environ.clear()
    programs = plan["programs"]
    if len(programs) == 1:
        _execute(plan, 0)
    children = []
    for index in range(len(programs)):
        pid = os.fork()
        if pid == 0:
            try:
                _die_with_parent()
                _execute(plan, index)
            except BaseException as error:
                _complain(2, f"the sandbox could not be built: {error}")
            finally:
                os._exit(_NOT_BUILT)
        children.append(pid)
    # One does not live without the other, nor without us.
    ended, status = os.wait()
    for pid in children:
        if pid != ended:
            os.kill(pid, signal.SIGKILL)
    os._exit(_code(status))


def _execute(plan: Plan, index: int) -> NoReturn:
    """Become a program, with no descriptors but its own."""
    for fd in plan["descriptors"][index].values():
        os.set_inheritable(fd, True)
    program = plan["programs"][index]
    os.execv(program[0], program)  # noqa: S606


def _complain(fd: int, text: str) -> None:
    os.write(fd, f"{text}\n".encode("utf-8", "replace"))


# The keeper.


def _keep(plan: Plan) -> None:
    # What loses its parent at the end is ours, and no zombie of this machine's first process.
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1)), "prctl")
    log_reader, log_writer = os.pipe()
    mapped = _Shared()
    ours, theirs = socket.socketpair()
    statuses = _open_descriptors(plan)
    pid = os.fork()
    if pid == 0:
        ours.close()
        for fd in (1, 2):
            os.dup2(log_writer, fd)
        try:
            _build(plan, mapped, theirs)
        except BaseException as error:
            _complain(2, f"the sandbox could not be built: {error}")
        finally:
            os._exit(_NOT_BUILT)
    theirs.close()
    for descriptors in plan["descriptors"]:
        for fd in descriptors.values():
            os.close(fd)
    with ours:
        if ours.recv(1):
            mapped.value = _map_users(pid, plan, log_writer)
            with contextlib.suppress(OSError):
                ours.send(b"1")
    os.close(log_writer)
    log = _Log(plan["log"])
    _announce(statuses, log_reader, log, pid)
    while True:
        data = os.read(log_reader, _READ_BYTES)
        if not data:
            break
        log.write(data)
    status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    _finish(plan, status)


class _Shared:
    """One byte that keeper and builder share."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, 1)

    @property
    def value(self) -> bool:
        """What it is."""
        return bool(self._page[0])

    @value.setter
    def value(self, holds: bool) -> None:
        self._page[0] = int(holds)


def _open_descriptors(plan: Plan) -> list[int]:
    """Open what the programs' words name, each for itself; return where bwrap will say which processes it made."""
    filters = bytes.fromhex(plan["seccomp"])
    links = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    statuses, plan["descriptors"] = [], []
    for index, program in enumerate(plan["programs"]):
        reader, writer = os.pipe()
        descriptors = {"status": writer, "filter": os.memfd_create("filter"), "link": links[index].detach()}
        os.write(descriptors["filter"], filters)
        os.lseek(descriptors["filter"], 0, os.SEEK_SET)
        plan["programs"][index] = [word.format(**descriptors) for word in program]
        plan["descriptors"].append(descriptors)
        statuses.append(reader)
    for link in links:
        link.close()
    return statuses


def _map_users(pid: int, plan: Plan, complain: int) -> bool:
    try:
        if plan["deny_setgroups"]:
            with open(f"/proc/{pid}/setgroups", "w") as file:
                file.write("deny")
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write("".join(f"{inside} {outside} {count}\n" for inside, outside, count in plan[name]))
    except OSError as error:
        _complain(complain, f"the sandbox's users cannot be mapped: {error}")
        return False
    return True


def _announce(statuses: Sequence[int], log_reader: int, log: _Log, builder: int) -> None:
    """Say which processes the sandbox consists of, once they exist; a sandbox that ends before says nothing."""
    pids: dict[int, int] = {}
    heard, waited_for = dict.fromkeys(statuses, b""), {*statuses, log_reader}
    while len(pids) < len(statuses) and waited_for >= set(statuses) - set(pids):
        for fd in select.select(list(waited_for), [], [])[0]:
            data = os.read(fd, _READ_BYTES)
            if not data:
                waited_for.discard(fd)
            elif fd == log_reader:
                log.write(data)
            else:
                heard[fd] += data
                for pid in _child_pids(heard[fd]):
                    pids[fd] = pid
    if len(pids) == len(statuses):
        os.write(1, json.dumps({"builder": builder, "pids": [pids[fd] for fd in statuses]}).encode() + b"\n")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _child_pids(heard: bytes) -> list[int]:
    whole, _, _ = heard.rpartition(b"\n")
    found = [json.loads(line) for line in whole.splitlines() if line.strip()]
    return [each["child-pid"] for each in found if "child-pid" in each]


class _Log:
    """The newest lines of the sandbox, in two files of bounded size."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._size = 0

    def write(self, data: bytes) -> None:
        """Keep data; a full disk loses it, and nothing else."""
        if self._size + len(data) > _LOG_BYTES:
            os.close(self._fd)
            os.replace(self._path, f"{self._path}.1")
            self._open()
        with contextlib.suppress(OSError):
            self._size += os.write(self._fd, data)


def _finish(plan: Plan, status: int) -> None:
    record = {"ExitCode": _code(status), "OOMKilled": _ran_out_of_memory(plan["oom_counters"])}
    unborn = f"{plan['exit']}.new"
    with contextlib.suppress(OSError), open(unborn, "w") as file:
        json.dump(record, file)
    with contextlib.suppress(OSError):
        os.replace(unborn, plan["exit"])
    for folder in plan["cgroups"]:
        for _ in range(_CGROUP_TRIES):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(_CGROUP_PAUSE_S)
            else:
                break


def _ran_out_of_memory(counters: Sequence[str]) -> bool:
    for path in counters:
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(path) as file:
                text = file.read()
            if int(text.split("oom_kill ", 1)[1].split()[0]) > 0:
                return True
    return False


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(_number, signal.SIG_IGN)  # whose terminal it is does not matter: the provider ends us
    _keep(json.loads(sys.stdin.read()))
