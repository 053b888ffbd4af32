"""What a forked child does to become the worker of a session: give up everything, then run it."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import secrets
import signal
import socket
from pathlib import Path
from typing import NoReturn

from broker.supervisor import prctl
from broker.supervisor.config import SupervisorConfig
from broker.supervisor.landlock import Ruleset
from broker.supervisor.preloading import seed_anew

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Exit status of a child that could not become a worker; the reason is on the supervisor's stderr.
EXIT_NOT_STARTED = 70


def run_worker(
    config: SupervisorConfig,
    slot: int,
    channel_fd: int,
    ruleset: Ruleset | None,
    *,
    parent_pid: int,
    supervisor_pid: int,
) -> NoReturn:
    """Turn this process, forked from the zygote, into the worker of ``slot``; never returns.

    Args:
        config: The supervisor's.
        slot: The session's slot.
        channel_fd: The worker's end of its channel; every other descriptor is closed.
        ruleset: What it may touch, or None for whatever users and mounts allow.
        parent_pid: The zygote's pid.
        supervisor_pid: The supervisor's pid.
    """
    status = EXIT_NOT_STARTED
    try:
        gc.enable()
        _reset_signals()
        become_session(config, slot, ruleset, keep={channel_fd})
        if os.getppid() != parent_pid:  # it ended before its end would have been ours
            raise ProcessLookupError("the zygote has ended")
        _enter_home(config, slot, supervisor_pid)
        seed_anew()
        status = _run(config, channel_fd)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"worker of slot {slot}: {type(error).__name__}: {error}\n".encode("utf-8", "replace"))
    finally:
        os._exit(status)


def become_session(config: SupervisorConfig, slot: int, ruleset: Ruleset | None, *, keep: set[int]) -> None:
    """Give up everything that a session must not have: descriptors, limits, users, capabilities, files.

    Args:
        config: The supervisor's.
        slot: The session's slot.
        ruleset: What it may touch, or None.
        keep: Descriptors that stay open, beside the standard ones.
    """
    close_descriptors(keep if ruleset is None else {*keep, ruleset.fileno()})
    os.setsid()
    _set_limits(config)
    _become_guest(config, slot)
    if ruleset is not None:
        ruleset.restrict_self()


def _run(config: SupervisorConfig, channel_fd: int) -> int:
    from broker.worker.main import run

    null = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(null, fd)
    os.close(null)
    run(socket.socket(fileno=channel_fd), guest_socket=config.guest_socket)
    return 0


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def close_descriptors(keep: set[int]) -> None:
    """Close every descriptor but these and the standard ones; nothing is to be read from standard input."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - keep - {0, 1, 2}:
        with contextlib.suppress(OSError):  # the one that listed them
            os.close(fd)


def _set_limits(config: SupervisorConfig) -> None:
    if config.one_user:
        prctl.set_dumpable(True)  # the supervisor is not, and what is in /proc/self is not its own then
    Path("/proc/self/oom_score_adj").write_text("1000")  # before the drop: afterwards the file is root's
    wanted_limits = {resource.RLIMIT_NOFILE: config.nofile, resource.RLIMIT_CORE: 0}
    if config.separate_users or config.one_user:  # else it would count all processes of whoever runs the tests
        wanted_limits[resource.RLIMIT_NPROC] = config.nproc
    for what, wanted in wanted_limits.items():
        _, hard = resource.getrlimit(what)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(what, (limit, limit))


def _become_guest(config: SupervisorConfig, slot: int) -> None:
    if config.separate_users:
        uid = config.guest_uid(slot)
        prctl.become_user(uid, uid)
    prctl.set_no_new_privileges()
    prctl.set_dumpable(True)  # the change of uid took /proc/self away
    prctl.set_parent_death_signal(signal.SIGKILL)
    os.umask(0o077)


def own_environment(config: SupervisorConfig, *, home: str) -> None:
    """Replace the environment variables by those of generated code.

    Args:
        config: The supervisor's.
        home: Home directory, and the place for temporary files.
    """
    os.environ.clear()
    os.environ.update(
        {"HOME": home, "TMPDIR": home, "USER": "guest", "LOGNAME": "guest", "PATH": _PATH, "LANG": "C.UTF-8"}
    )
    os.environ.update(config.environment)


def _enter_home(config: SupervisorConfig, slot: int, supervisor_pid: int) -> None:
    # The random part keeps others from squatting; the rest is what ``GroupSweeper`` goes by.
    home = f"/tmp/session-{slot}-{supervisor_pid}-{secrets.token_hex(4)}"  # noqa: S108
    os.mkdir(home, 0o700)
    os.chdir(home)
    own_environment(config, home=home)
