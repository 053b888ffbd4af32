"""Landlock's rules, felt by a child that binds itself by them."""

from __future__ import annotations

import errno
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.protocol.exits import EXIT_OUT_OF_MEMORY
from broker.supervisor import confinement, landlock, prctl
from broker.supervisor.config import SupervisorConfig
from broker.supervisor.core import exit_reason, own_exit_status

needs_landlock = pytest.mark.skipif(landlock.abi() == 0, reason="this kernel has no Landlock")


@pytest.fixture
def folder() -> Iterator[Path]:
    # Outside of /tmp, where sessions may write.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        for name in ("host", "guest", "elsewhere"):
            (Path(made) / name).mkdir()
        yield Path(made)


def config(folder: Path, *, landlock: bool = True) -> SupervisorConfig:
    return SupervisorConfig(
        host_socket=str(folder / "host" / "s"), guest_socket=str(folder / "guest" / "s"), landlock=landlock
    )


def errno_in_child(ruleset: landlock.Ruleset | None, act: Callable[[], object]) -> str:
    """What an act comes to in a process that is bound by the rules."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            prctl.set_no_new_privileges()
            if ruleset is not None:
                ruleset.restrict_self()
            act()
            code = 0
        except OSError as error:
            code = error.errno or 254
        finally:
            os._exit(code)
    if ruleset is not None:
        ruleset.close()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return errno.errorcode.get(status, str(status)) if status else "it worked"


def bind(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


def write_oom_score() -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")


@needs_landlock
def test_a_session_writes_to_its_folders_and_nowhere_else(folder: Path) -> None:
    acts: dict[str, Callable[[], object]] = {
        "a file elsewhere": lambda: (folder / "elsewhere" / "f").write_text("x"),
        "a folder elsewhere": lambda: (folder / "elsewhere" / "d").mkdir(),
        "a socket elsewhere": lambda: bind(folder / "elsewhere" / "s"),
        "its oom_score_adj": write_oom_score,
        "that of its threads": lambda: open(f"/proc/self/task/{os.getpid()}/oom_score_adj", "w").close(),
        "reading elsewhere": lambda: Path("/var/lib/dpkg/status").read_bytes(),
    }
    denied = {name: errno_in_child(confinement.for_workers(config(folder)), act) for name, act in acts.items()}
    assert denied == dict.fromkeys(acts, "EACCES")
    # The same without the rules: they are what denies it.
    del acts["reading elsewhere"]
    assert {name: errno_in_child(None, act) for name, act in acts.items()} == dict.fromkeys(acts, "it worked")


@needs_landlock
def test_a_session_reads_the_system_and_uses_devices_and_temporary_folders(folder: Path) -> None:
    def use() -> None:
        os.listdir("/")
        Path("/etc/passwd").read_text()
        Path("/proc/self/status").read_text()
        Path("/dev/null").write_text("x")
        with tempfile.TemporaryDirectory(dir="/tmp") as made:
            (Path(made) / "a").write_text("x")
            (Path(made) / "b").symlink_to("a")
            (Path(made) / "sub").mkdir()
            (Path(made) / "a").rename(Path(made) / "sub" / "a")
            bind(Path(made) / "s")
            os.mkfifo(Path(made) / "f")

    assert errno_in_child(confinement.for_workers(config(folder)), use) == "it worked"


@needs_landlock
def test_the_broker_makes_sockets_and_nothing_else(folder: Path) -> None:
    def make_and_move_a_socket() -> None:
        bind(folder / "host" / "s.new")
        os.chmod(folder / "host" / "s.new", 0o600)
        os.rename(folder / "host" / "s.new", folder / "host" / "s")
        os.unlink(folder / "host" / "s")

    assert errno_in_child(confinement.for_broker(config(folder)), make_and_move_a_socket) == "it worked"
    acts: dict[str, Callable[[], object]] = {
        "a file": lambda: (folder / "host" / "f").write_text("x"),
        "a folder": lambda: (folder / "host" / "d").mkdir(),
        "a link": lambda: (folder / "host" / "l").symlink_to("/etc/passwd"),
        "a pipe": lambda: os.mkfifo(folder / "host" / "p"),
        "a socket elsewhere": lambda: bind(folder / "elsewhere" / "s"),
        "a file in /tmp": lambda: open(f"/tmp/{os.getpid()}", "w").close(),
    }
    assert {
        name: errno_in_child(confinement.for_broker(config(folder)), act) for name, act in acts.items()
    } == dict.fromkeys(acts, "EACCES")


@pytest.mark.skipif(landlock.abi() < 6, reason="this kernel's Landlock has no scopes")
def test_a_session_reaches_no_abstract_socket_or_process_outside(folder: Path) -> None:
    name = f"\0rlm-sandbox-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(name)
        listener.listen()
        for act in (lambda: client.connect(name), lambda: os.kill(os.getppid(), 0)):
            assert errno_in_child(confinement.for_workers(config(folder)), act) == "EPERM"
            assert errno_in_child(None, act) == "it worked"


def test_where_it_is_not_asked_for_or_not_to_be_had_there_are_no_rules(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert confinement.for_workers(config(folder, landlock=False)) is None
    assert confinement.for_broker(config(folder, landlock=False)) is None
    monkeypatch.setattr(landlock, "abi", lambda: 0)
    assert confinement.for_workers(config(folder)) is None
    assert confinement.for_broker(config(folder)) is None


@pytest.mark.parametrize("abi", [1, 2, 3, 4, 5, 6])
def test_an_older_kernel_gets_what_it_knows(folder: Path, monkeypatch: pytest.MonkeyPatch, abi: int) -> None:
    if landlock.abi() < abi:
        pytest.skip("this kernel's Landlock is older itself")
    monkeypatch.setattr(landlock, "abi", lambda: abi)
    ruleset = confinement.for_workers(config(folder))
    assert errno_in_child(ruleset, lambda: (folder / "elsewhere" / "f").write_text("x")) == "EACCES"


@pytest.mark.parametrize(
    ("status", "oom", "expected"),
    [
        (0, False, 0),
        (3 << 8, False, 3),
        (signal.SIGKILL, True, EXIT_OUT_OF_MEMORY),
        (signal.SIGKILL, False, 143),
        (signal.SIGSEGV, False, 139),
    ],
)
def test_pid_1_ends_as_the_broker_did(status: int, oom: bool, expected: int) -> None:
    assert own_exit_status(status, exit_reason(status, oom=oom)) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_becoming_a_user_leaves_no_capability_in_any_set() -> None:
    def look() -> None:
        prctl.become_user(61_500, 61_501)
        status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        sets = {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
        if sets != dict.fromkeys(sets, 0) or (os.getresuid(), os.getgroups()) != ((61_500,) * 3, []):
            raise OSError(errno.EXDEV, str(sets))

    assert errno_in_child(None, look) == "it worked"
