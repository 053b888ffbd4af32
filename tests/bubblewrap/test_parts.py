"""Claims about the parts that need no sandbox: the filter's compiler, control groups, the program, the choice."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from host_client import preparing
from host_client.bubblewrap import bpf, cgroups
from host_client.bubblewrap.program import ensure_bwrap
from host_client.errors import BadSetting, BubblewrapMissing, EngineUnavailable, ImageBuildFailed
from host_client.machine import Machine
from host_client.providers import choice
from host_client.providers.bubblewrap import BubblewrapProvider
from host_client.providers.docker import DockerProvider
from host_client.seccomp import own_profile
from host_client.settings import SandboxSettings


class FakeMachine(Machine):
    """A machine with some programs, which apt can add to."""

    def __init__(self, *programs: str, root: bool = True, version: str = "bubblewrap 0.8.0") -> None:
        self.programs, self.root, self.version = set(programs), root, version
        self.ran: list[list[str]] = []

    def is_root(self) -> bool:
        return self.root

    def is_debian(self) -> bool:
        return True

    def which(self, program: str) -> str | None:
        return f"/usr/bin/{program}" if program in self.programs else None

    def run(self, argv: Any, *, timeout_s: float) -> tuple[int, str]:
        self.ran.append(list(argv))
        if "install" in argv:
            self.programs.add("bwrap")
        return 0, self.version


def test_the_program_is_installed_where_we_may() -> None:
    machine = FakeMachine()
    said: list[str] = []
    assert ensure_bwrap(said.append, machine) == "/usr/bin/bwrap"
    assert "bubblewrap" in machine.ran[0]
    assert "apt-get" in said[0]


def test_the_program_is_asked_for_where_we_may_not() -> None:
    with pytest.raises(BubblewrapMissing, match="sudo apt-get install -y bubblewrap"):
        ensure_bwrap(print, FakeMachine(root=False))


def test_a_program_that_is_too_old_is_refused() -> None:
    with pytest.raises(BubblewrapMissing, match=r"0\.4\.1"):
        ensure_bwrap(print, FakeMachine("bwrap", version="bubblewrap 0.4.1"))


def test_the_filter_has_whole_instructions_and_begins_with_what_is_newer() -> None:
    program = bpf.compiled(own_profile())
    instructions = list(struct.iter_unpack("=HBBI", program))
    assert 100 < len(instructions) < 4096, "the kernel takes 4,096"
    assert (0x06, 0, 0, 0x00050000 | 38) in instructions[:6]


@pytest.mark.parametrize(
    "profile",
    [
        {"defaultAction": "SCMP_ACT_PERHAPS"},
        {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "NO"}]},
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "op": "LIKE"}]}],
        },
    ],
)
def test_a_profile_that_says_what_there_is_not_is_refused(profile: dict[str, Any]) -> None:
    with pytest.raises(BadSetting, match="seccomp profile"):
        bpf.compiled(profile)


def test_rules_for_capabilities_apply_to_those_who_have_them() -> None:
    rule = {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}}
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}, rule]}
    assert bpf.compiled(profile) != bpf.compiled(profile, ["SYS_ADMIN"])


_MOUNT_2 = "30 25 0:26 / {} rw,nosuid - cgroup2 cgroup rw,nsdelegate"
_MOUNT_1 = "3{} 25 0:2{} / {}/{} rw - cgroup cgroup rw,{}"


def test_version_2_gets_every_limit_in_one_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "rlm-sandbox"):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.subtree_control").write_text("cpu")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(_MOUNT_2.format(tmp_path) + "\n")
    groups = cgroups.create("one", SandboxSettings(memory=1 << 27, pids=99, cpus=0.5), mounts)
    [folder] = groups.folders
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids"
    found = {name: (folder / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max")}
    assert found == {
        "memory.max": str(1 << 27),
        "memory.swap.max": "0",
        "pids.max": "99",
        "cpu.max": "50000 100000",
    }
    assert groups.views == {"/sys/fs/cgroup": folder}


def test_version_1_gets_a_folder_for_each_controller(tmp_path: Path) -> None:
    names = ("memory", "pids", "cpu")
    mounts = tmp_path / "mountinfo"
    mounts.write_text("".join(_MOUNT_1.format(i, i, tmp_path, name, name) + "\n" for i, name in enumerate(names)))
    groups = cgroups.create("one", SandboxSettings(memory=1 << 27, pids=99, cpus=0.5), mounts)
    assert groups.views == {f"/sys/fs/cgroup/{name}": tmp_path / name / "rlm-sandbox" / "one" for name in names}
    assert (tmp_path / "memory/rlm-sandbox/one/memory.limit_in_bytes").read_text() == str(1 << 27)
    assert (tmp_path / "cpu/rlm-sandbox/one/cpu.cfs_quota_us").read_text() == "50000"


def test_who_may_not_make_control_groups_gets_none(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(_MOUNT_2.format(tmp_path / "missing") + "\n")
    assert cgroups.create("one", SandboxSettings(), mounts).folders == ()


def test_an_ordinary_user_with_a_systemd_of_his_own_asks_that_for_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemd-run"
    program.touch(0o755)
    (tmp_path / "systemd").mkdir()
    (tmp_path / "systemd" / "private").touch()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    environ = {"PATH": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    command = cgroups.command_prefix(SandboxSettings(memory=1 << 27, pids=99, cpus=0.5), environ)
    assert command[0] == str(program)
    assert {"--user", "--scope", "--property=MemoryMax=134217728", "--property=TasksMax=99"} <= set(command)
    assert "--property=CPUQuota=50%" in command
    assert cgroups.command_prefix(SandboxSettings(), {"PATH": str(tmp_path)}) == []


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr("host_client.providers.docker_engine.DEFAULT_SOCKET", f"unix://{tmp_path}/engine.sock")
    monkeypatch.setattr("host_client.providers.docker_engine.engine_url", lambda: f"unix://{tmp_path}/engine.sock")


def test_an_engine_that_answers_is_chosen(no_engine: None, tmp_path: Path) -> None:
    assert choice.choose(SandboxSettings(), FakeMachine("bwrap")).name == "bubblewrap"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/engine.sock")
        listener.listen()
        assert choice.choose(SandboxSettings(), FakeMachine("bwrap")) == choice.Choice("docker", "an engine answers")


def test_without_engine_and_without_program_the_engines_error_says_what_helps(no_engine: None) -> None:
    assert choice.choose(SandboxSettings(), FakeMachine()).name == "docker"


@pytest.mark.parametrize("setting", [{"image": "mine:1"}, {"runtime": "runsc"}, {"network": True}])
def test_what_only_an_engine_has_is_never_dropped(no_engine: None, setting: dict[str, Any]) -> None:
    assert choice.choose(SandboxSettings(**setting), FakeMachine("bwrap")).name == "docker"


def test_an_engine_that_was_named_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    assert choice.choose(SandboxSettings(), FakeMachine("bwrap")).name == "docker"


def test_the_choice_is_said_and_made(
    no_engine: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choice._say_once.cache_clear()
    monkeypatch.setattr("host_client.machine.Machine.which", lambda self, program: f"/usr/bin/{program}")
    for _ in range(2):
        assert isinstance(choice.provider_for(SandboxSettings()), BubblewrapProvider)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "bubblewrap" in caplog.text
    assert isinstance(choice.provider_for(SandboxSettings(provider="docker")), DockerProvider)


def test_set_up_falls_back_only_where_no_engine_can_be_had(no_engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(_: object) -> None:
        raise EngineUnavailable("no engine answers")

    monkeypatch.setattr("host_client.engine.ensure_engine", unavailable)
    monkeypatch.setattr(preparing, "_without_engine", lambda *_: "files")
    monkeypatch.setattr("host_client.machine.Machine.which", lambda self, program: f"/usr/bin/{program}")
    assert preparing.prepare(SandboxSettings(), lambda _: None) == "files"
    with pytest.raises(EngineUnavailable):
        preparing.prepare(SandboxSettings(provider="docker"), lambda _: None)
    with pytest.raises(EngineUnavailable):
        preparing.prepare(SandboxSettings(runtime="runsc"), lambda _: None)


def test_an_image_that_cannot_be_built_is_an_error_and_no_reason_to_be_weaker(
    no_engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ImageBuildFailed("no wheel")

    monkeypatch.setattr("host_client.engine.ensure_engine", lambda _: object())
    monkeypatch.setattr(preparing, "_with_engine", fails)
    with pytest.raises(ImageBuildFailed):
        preparing.prepare(SandboxSettings(), lambda _: None)
