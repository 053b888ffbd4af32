"""Claims about sandboxes without an engine: how they start, are found, die, and leave nothing."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
from pathlib import Path

import pytest

from host_client import SandboxInterpreter
from host_client.bubblewrap.records import Record, Records
from host_client.errors import (
    BadSetting,
    BubblewrapMissing,
    ImageMissing,
    PreloadFailed,
    ProviderError,
    SandboxTooWeak,
    SessionLost,
    UnknownSandbox,
)
from host_client.owner import Owner
from host_client.providers.base import SandboxHandle
from host_client.providers.bubblewrap import BubblewrapProvider
from host_client.providers.isolation import Isolation
from host_client.providers.launch import NameTaken
from host_client.reaper import reap
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from tests.bubblewrap.sandboxes import CGROUPS, leaks, run_host, start_host

SETTINGS = SandboxSettings(memory=256 << 20, pids=256, max_sessions=2)


def record_of(handle: SandboxHandle, runtime: RuntimeDir) -> Record:
    found = Records(runtime).read(handle.sandbox_id)
    assert found is not None
    return found


def pid_1(handle: SandboxHandle, runtime: RuntimeDir) -> int:
    owner = Owner.parse(record_of(handle, runtime).processes[0])
    assert owner is not None
    return owner.pid


def test_code_runs_with_tools_and_packages_and_nothing_is_left(
    provider: BubblewrapProvider, runtime: RuntimeDir
) -> None:
    with SandboxInterpreter({"double": lambda n: n * 2}, settings=SETTINGS, provider=provider) as interpreter:
        code = "import numpy, os\n[int(numpy.int64(double(21))), os.getuid() >= 20000, os.path.exists('/home')]"
        assert interpreter.execute(code) == [42, True, False]
        handle = interpreter.sandbox_handle
        assert handle is not None
        record = record_of(handle, runtime)
        pid = pid_1(handle, runtime)
    assert leaks(runtime) == []
    assert not os.path.exists(f"/proc/{pid}")
    assert record.groups
    assert not any(Path(folder).exists() for folder in record.groups)


def test_sessions_are_forked_from_a_process_that_has_the_preloads(provider: BubblewrapProvider) -> None:
    settings = dataclasses.replace(SETTINGS, preload=("numpy",))
    with SandboxInterpreter(settings=settings, provider=provider) as interpreter:
        assert interpreter.execute("import os, sys\n['numpy' in sys.modules, os.getppid() > 1]") == [True, True]


def test_a_preload_that_is_not_there_is_named_and_nothing_is_left(
    provider: BubblewrapProvider, runtime: RuntimeDir
) -> None:
    with pytest.raises(PreloadFailed, match="no_such_module"):
        provider.start(dataclasses.replace(SETTINGS, preload=("no_such_module",)))
    assert leaks(runtime) == []


def test_the_limits_are_those_of_the_settings(provider: BubblewrapProvider, runtime: RuntimeDir) -> None:
    handle = provider.start(SETTINGS)
    values = {
        path.name: path.read_text().strip()
        for folder in record_of(handle, runtime).groups
        for path in Path(folder).iterdir()
        if path.name in ("memory.max", "memory.limit_in_bytes", "pids.max")
    }
    assert values.pop("pids.max") == "256"
    assert list(values.values()) == [str(256 << 20)]
    assert all(Path(folder).is_relative_to(CGROUPS) for folder in record_of(handle, runtime).groups)


def test_even_pid_1_is_nobodys_root_outside(provider: BubblewrapProvider, runtime: RuntimeDir) -> None:
    pid = pid_1(provider.start(SETTINGS), runtime)
    status = Path(f"/proc/{pid}/status").read_text()
    assert status.split("Uid:")[1].split()[:3] == ["19998"] * 3
    namespaces = {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in ("user", "pid", "mnt", "ipc", "uts", "net")}
    assert not [name for name, inode in namespaces.items() if os.readlink(f"/proc/self/ns/{name}") == inode]


@pytest.mark.parametrize("when", ["idle", "executing"])
def test_one_that_is_killed_is_told_as_such_and_leaves_nothing(
    when: str, provider: BubblewrapProvider, runtime: RuntimeDir
) -> None:
    made = SandboxInterpreter(settings=SETTINGS, provider=provider)

    def kill() -> None:
        assert made.sandbox_handle is not None
        fd = os.pidfd_open(pid_1(made.sandbox_handle, runtime))
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        select.select([fd], [], [], 10.0)
        os.close(fd)

    made.tools["kill"] = kill
    made.execute("x = 1")
    if when == "idle":
        kill()
    for _ in range(2):
        with pytest.raises(SessionLost) as lost:
            made.execute("x" if when == "idle" else "kill()\nwhile True: pass")
        assert lost.value.reason == "killed"
    assert leaks(runtime) == []


def test_one_whose_keeper_is_killed_ends_with_it(provider: BubblewrapProvider, runtime: RuntimeDir) -> None:
    handle = provider.start(SETTINGS)
    record = record_of(handle, runtime)
    keeper = Owner.parse(record.keeper)
    assert keeper is not None
    fd = os.pidfd_open(pid_1(handle, runtime))
    os.kill(keeper.pid, signal.SIGKILL)
    assert select.select([fd], [], [], 10.0)[0], "PID 1 goes on without anybody who knows of it"
    os.close(fd)
    assert provider.why_dead(handle) == "killed"
    provider.stop(handle)
    assert leaks(runtime) == []
    assert not any(Path(folder).exists() for folder in record.groups)


def test_memory_that_runs_out_is_told_as_such(provider: BubblewrapProvider) -> None:
    with SandboxInterpreter(settings=SETTINGS, provider=provider, execution_timeout_s=60.0) as made:
        with pytest.raises(SessionLost) as lost:
            made.execute("held = []\nwhile True: held.append(b'x' * 10_000_000)")
        assert lost.value.reason == "oom"


def test_a_named_one_outlives_its_starter_and_can_be_found_used_and_stopped(
    provider: BubblewrapProvider, runtime: RuntimeDir
) -> None:
    run_host("provider.start(settings, name='kept')")
    handle = provider.find("kept")
    with pytest.raises(NameTaken):
        provider.start(SETTINGS, name="kept")
    for _ in range(2):
        with SandboxInterpreter(settings=SETTINGS, provider=provider, sandbox="kept") as interpreter:
            assert interpreter.execute("6 * 7") == 42
    assert [each.sandbox_id for each in provider.reachable("kept")] == [handle.sandbox_id]
    provider.stop(handle)
    with pytest.raises(UnknownSandbox, match="rlm-sandbox up kept"):
        provider.find("kept")
    assert leaks(runtime) == []


def test_a_name_whose_sandbox_ended_is_free_again(provider: BubblewrapProvider, runtime: RuntimeDir) -> None:
    first = provider.start(SETTINGS, name="again")
    Records(runtime).read(first.sandbox_id).kill()  # type: ignore[union-attr]
    with pytest.raises(UnknownSandbox, match="has stopped"):
        provider.find("again")
    second = provider.start(SETTINGS, name="again")
    assert second.sandbox_id != first.sandbox_id
    provider.stop(second)
    assert leaks(runtime) == []


def test_what_a_killed_host_left_is_removed_by_the_next_start_and_named_ones_are_spared(
    provider: BubblewrapProvider, runtime: RuntimeDir
) -> None:
    host = start_host(
        "provider.start(settings, name='kept'); handle = provider.start(settings); print(handle.sandbox_id, flush=True)"
        "; sys.stdin.read()"
    )
    assert host.stdout is not None
    orphan = host.stdout.readline().strip()
    host.kill()
    host.communicate()
    provider.stop(provider.start(SETTINGS))
    assert [record.name for record in Records(runtime).all()] == ["kept"]
    assert not (runtime.path / orphan).exists()
    assert provider.why_dead(provider.find("kept")) is None


def test_docker_s_reaper_leaves_them_alone(provider: BubblewrapProvider, runtime: RuntimeDir) -> None:
    class NoContainers:
        def list(self, labels: object) -> list[dict[str, object]]:
            return []

        def remove(self, container_id: str, force: bool = True) -> None:
            raise AssertionError

    run_host("provider.start(settings, name='kept')")
    reap(NoContainers(), runtime)
    with SandboxInterpreter(settings=SETTINGS, provider=provider, sandbox="kept") as interpreter:
        assert interpreter.execute("6 * 7") == 42


def test_an_owned_one_ends_with_its_process(runtime: RuntimeDir) -> None:
    run_host("provider.start(settings)")
    assert leaks(runtime) == []


def test_one_that_another_process_adopted_ends_with_that_one(provider: BubblewrapProvider, runtime: RuntimeDir) -> None:
    handle = provider.start(SETTINGS)
    provider.disown(handle)
    run_host(
        "from host_client.providers.base import SandboxHandle\nfrom pathlib import Path\n"
        f"provider.adopt(SandboxHandle(sandbox_id={handle.sandbox_id!r}, name={handle.name!r}, "
        f"socket_path=Path({str(handle.socket_path)!r}), owned=True))"
    )
    assert leaks(runtime) == []
    assert provider.why_dead(handle) == "removed"


def test_a_sandbox_that_is_too_weak_is_refused_and_nothing_is_left(runtime: RuntimeDir) -> None:
    weak = BubblewrapProvider(isolation_of=lambda _: Isolation(seccomp={"defaultAction": "SCMP_ACT_ALLOW"}))
    with pytest.raises(SandboxTooWeak, match="io_uring"):
        weak.start(SETTINGS)
    assert leaks(runtime) == []


def test_one_capability_too_many_is_noticed(runtime: RuntimeDir) -> None:
    weak = BubblewrapProvider(isolation_of=lambda _: Isolation(capabilities=(*Isolation().capabilities, "NET_RAW")))
    with pytest.raises(SandboxTooWeak, match="supervisor's capabilities"):
        weak.start(SETTINGS)


def test_a_limit_that_the_machine_does_not_hold_is_noticed(
    runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host_client.bubblewrap.cgroups._hierarchies", lambda _: (None, {}))
    with pytest.raises(SandboxTooWeak, match="memory: wanted at most 256 MiB, found no limit"):
        BubblewrapProvider().start(SETTINGS)
    assert leaks(runtime) == []


def test_one_that_cannot_be_built_says_why_and_leaves_nothing(
    provider: BubblewrapProvider, runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host_client.providers.bubblewrap.find_bwrap", lambda: "/nonexistent/bwrap")
    with pytest.raises(ProviderError, match=r"could not be built[^$]*No such file"):
        provider.start(SETTINGS)
    assert leaks(runtime) == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"network": True}, "network"), ({"runtime": "runsc"}, "runtime"), ({"image": "mine:1"}, "image")],
)
def test_what_needs_an_engine_is_refused_by_name(
    changed: dict[str, object], named: str, provider: BubblewrapProvider, runtime: RuntimeDir
) -> None:
    with pytest.raises(BadSetting, match=named):
        provider.start(dataclasses.replace(SETTINGS, **changed))  # type: ignore[arg-type]
    assert leaks(runtime) == []


def test_files_that_were_not_made_yet_are_named_with_what_helps(
    provider: BubblewrapProvider, runtime: RuntimeDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ImageMissing, match="rlm-sandbox image"):
        provider.start(SETTINGS)


def test_a_machine_without_the_program_is_told_how_to_get_it(
    provider: BubblewrapProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host_client.machine.Machine.which", lambda self, program: None)
    with pytest.raises(BubblewrapMissing, match="bubblewrap"):
        provider.start(SETTINGS)


def test_a_forked_child_leaves_its_parents_sandboxes_alone(provider: BubblewrapProvider) -> None:
    handle = provider.start(SETTINGS)
    pid = os.fork()
    if pid == 0:
        provider.stop(handle)
        provider.stop_all_owned()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert provider.why_dead(handle) is None


def test_two_sandboxes_have_users_of_their_own(provider: BubblewrapProvider, runtime: RuntimeDir) -> None:
    uids = set()
    for _ in range(2):
        pid = pid_1(provider.start(SETTINGS), runtime)
        uids |= {line.split()[1] for line in Path(f"/proc/{pid}/uid_map").read_text().splitlines()[-1:]}
    assert len(uids) == 2


def test_branches_share_the_sandbox_and_the_last_one_ends_it(provider: BubblewrapProvider, runtime: RuntimeDir) -> None:
    parent = SandboxInterpreter({"shout": str.upper}, settings=SETTINGS, provider=provider)
    parent.execute("x = [1]")
    snapshot = parent.snapshot()
    [branch] = parent.fork()
    parent.execute("x.append(2)")
    parent.rollback(snapshot)
    assert parent.execute("x") == [1]
    parent.shutdown(wait=True)
    assert branch.execute("[x, shout('a')]") == [[1], "A"]
    with pytest.raises(SessionLost, match="SIGSEGV"):
        branch.execute("import os; os.kill(os.getpid(), 11)")
    branch.shutdown(wait=True)
    assert leaks(runtime) == []
