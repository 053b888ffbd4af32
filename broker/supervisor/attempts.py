"""What generated code must not be able to do, tried out by a process that was made just like a session."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import functools
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

from broker.protocol.self_test import Check
from broker.supervisor.config import SupervisorConfig
from broker.supervisor.proc_status import has_no_capabilities, read_status

_AF_ALG = 38
_CLONE_NEWUSER = 0x10000000
_IO_URING_SETUP = 425
_IFF_UP = 1

#: A door that is shut, or was never built.
_SHUT = frozenset({errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSYS, errno.EAFNOSUPPORT, errno.ENOENT})
REFUSED = "refused"

_libc = ctypes.CDLL(None, use_errno=True)


def run_attempts(config: SupervisorConfig, broker_pid: int | None, *, confined: bool) -> list[Check]:
    """Try everything; to be called in a process that ``become_session`` was called in.

    Args:
        config: The supervisor's.
        broker_pid: The broker's pid, or None where it is in another pid namespace.
        confined: Whether Landlock's rules bind this process.
    """
    return [
        _users(config),
        *_privileges(),
        _root_is_read_only(),
        _interfaces(),
        _refused("internet sockets", lambda: socket.socket(socket.AF_INET).close()),
        _refused("AF_ALG", lambda: socket.socket(_AF_ALG, socket.SOCK_SEQPACKET).close()),
        _refused("io_uring", lambda: _syscall(_IO_URING_SETUP, 0, None)),
        _others_memory(broker_pid),
        _refused("host's socket", lambda: os.listdir(os.path.dirname(config.host_socket))),
        *_limits(config),
        _out_of_memory(confined),
        # Last: where it works, the rest would be tried out in another world.
        _refused("user namespaces", lambda: _syscall_result(_libc.unshare(_CLONE_NEWUSER))),
    ]


def _others_memory(broker_pid: int | None) -> Check:
    """The broker's; where that is out of sight, supervisor's and zygote's, and nobody else may be in sight then."""
    pids = [1, os.getppid()] if broker_pid is None else [broker_pid]
    checks = [
        _refused("broker's memory", functools.partial(_open_and_close, f"/proc/{pid}/mem", os.O_RDONLY)) for pid in pids
    ]
    check = next((check for check in checks if not check.held), checks[0])
    known = {1, os.getppid(), os.getpid()}
    strangers = [name for name in os.listdir("/proc") if name.isdigit() and int(name) not in known]
    if broker_pid is None and strangers:
        found = f"processes {', '.join(strangers[:10])} are in sight"
        return dataclasses.replace(check, found=found, held=False)
    return check


def _open_and_close(path: str, flags: int) -> None:
    os.close(os.open(path, flags))


def _users(config: SupervisorConfig) -> Check:
    if config.one_user:
        ids = {*os.getresuid(), *os.getresgid()}
        wanted = "one user, kept apart by namespaces"
        return Check(name="user", wanted=wanted, found=", ".join(map(str, sorted(ids))), held=0 not in ids)
    uid = config.guest_uid(0) if config.separate_users else None
    ids = {*os.getresuid(), *os.getresgid()}
    groups = os.getgroups()
    found = f"{', '.join(map(str, sorted(ids)))}, {f'groups {groups}' if groups else 'no groups'}"
    wanted = f"{uid}, no groups" if uid is not None else "a user of its own"
    return Check(name="user", wanted=wanted, found=found, held=ids == {uid} and not groups)


def _privileges() -> list[Check]:
    status = read_status("self")
    none, found = has_no_capabilities(status)
    return [
        Check(name="capabilities", wanted="none in any set", found=found, held=none),
        _equals("no new privileges", "on", "on" if status.get("NoNewPrivs") == "1" else "off"),
        _equals("system call filter", "on", "on" if status.get("Seccomp") == "2" else "off"),
    ]


def _root_is_read_only() -> Check:
    read_only = bool(os.statvfs("/").f_flag & os.ST_RDONLY)
    return _equals("root file system", "read-only", "read-only" if read_only else "writable")


def _interfaces() -> Check:
    if not _names("/sys/class/net"):
        # Without that folder, by what the kernel has ways to: an interface that is down has none.
        routed = sorted({*_routes("/proc/net/route", 0), *_routes("/proc/net/ipv6_route", -1)} - {"Iface"})
        found = ", ".join(routed) or "none with a route"
        return Check(name="network interfaces", wanted="lo alone", found=found, held=set(routed) <= {"lo"})
    up = []
    for name in sorted(_names("/sys/class/net")):
        with contextlib.suppress(OSError, ValueError):
            if int(Path(f"/sys/class/net/{name}/flags").read_text(), 16) & _IFF_UP:
                up.append(name)
    found = ", ".join(up) or "none"
    return Check(name="network interfaces", wanted="lo alone", found=found, held=set(up) <= {"lo"})


def _routes(file: str, column: int) -> list[str]:
    with contextlib.suppress(OSError):
        return [line.split()[column] for line in Path(file).read_text().splitlines() if line.split()]
    return []


def _names(folder: str) -> set[str]:
    with contextlib.suppress(OSError):
        return set(os.listdir(folder))
    return set()


def _limits(config: SupervisorConfig) -> list[Check]:
    wanted = {"processes": (resource.RLIMIT_NPROC, config.nproc), "open files": (resource.RLIMIT_NOFILE, config.nofile)}
    checks = []
    for name, (which, most) in {**wanted, "core files": (resource.RLIMIT_CORE, 0)}.items():
        soft, hard = resource.getrlimit(which)
        found = "no limit" if resource.RLIM_INFINITY in (soft, hard) else str(max(soft, hard))
        held = found != "no limit" and int(found) <= most
        checks.append(Check(name=f"limit of {name}", wanted=f"at most {most}", found=found, held=held))
    return checks


def _out_of_memory(confined: bool) -> Check:
    """A session dies before the broker does; Landlock keeps it from changing that."""
    file = Path("/proc/self/oom_score_adj")
    score = file.read_text().strip()
    try:
        file.write_text("1000")
    except OSError as error:
        fixed, change = True, f"fixed ({_errno_name(error)})"
    else:
        fixed, change = False, "can be changed"
    held = score == "1000" and (fixed or not confined)
    wanted = "score 1000, fixed" if confined else "score 1000"
    return Check(name="killed first without memory", wanted=wanted, found=f"score {score}, {change}", held=held)


def _refused(name: str, attempt: Callable[[], object]) -> Check:
    try:
        attempt()
    except OSError as error:
        shut = error.errno in _SHUT
        found = f"{REFUSED if shut else 'possible'} ({_errno_name(error)})"
        return Check(name=name, wanted=REFUSED, found=found, held=shut)
    return Check(name=name, wanted=REFUSED, found="possible", held=False)


def _equals(name: str, wanted: str, found: str) -> Check:
    return Check(name=name, wanted=wanted, found=found, held=wanted == found)


def _errno_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def _syscall(number: int, *arguments: int | None) -> None:
    _syscall_result(_libc.syscall(ctypes.c_long(number), *arguments))


def _syscall_result(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
