"""What the commands about running sandboxes print, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from host_client import daemon
from host_client.errors import EngineUnavailable, ProviderError, SetupError, UnknownSandbox
from host_client.providers.docker import DockerProvider
from host_client.providers.fake_engine import FakeEngine
from host_client.runtime_dir import UIDS_PER_SANDBOX, RuntimeDir
from tests.host_client.provider_fixtures import SETTINGS, engine, left_over, provider, runtime

__all__ = ["engine", "provider", "runtime"]

Captured = pytest.CaptureFixture[str]


def up(engine: FakeEngine, name: str = "default", *, image: str = "fake:1") -> int:
    return daemon.up(name, SETTINGS, connect=engine.connect, image_of=lambda _: image)


@pytest.fixture(autouse=True)
def _in_its_own_place(runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command here works in a runtime directory of the test's own, and is found on the PATH."""
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")


def test_up_starts_it_and_says_what_to_type_next(engine: FakeEngine, capsys: Captured) -> None:
    assert up(engine) == 0
    printed = capsys.readouterr().out
    assert "sandbox 'default' is up" in printed
    assert "1 GiB of memory" in printed
    assert 'SandboxInterpreter.factory(sandbox="default")' in printed
    assert "rlm-sandbox down default" in printed
    assert not engine.connected


@pytest.mark.parametrize(
    ("version", "argument"),
    [
        ("3.2.1", 'interpreter=SandboxInterpreter(sandbox="default")'),
        ("3.4.1", 'interpreter_factory=SandboxInterpreter.factory(sandbox="default")'),
    ],
)
def test_what_to_type_fits_the_installed_dspy(
    engine: FakeEngine, capsys: Captured, monkeypatch: pytest.MonkeyPatch, version: str, argument: str
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    up(engine)
    assert argument in capsys.readouterr().out


def test_a_command_that_is_not_on_the_path_is_named_with_its_folder(
    engine: FakeEngine, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "rlm-sandbox").touch()
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    up(engine)
    printed = capsys.readouterr().out
    assert "in Python (bin/python)" in printed
    assert "To stop it: bin/rlm-sandbox down default" in printed


def test_up_twice_says_that_it_runs_and_keeps_it(engine: FakeEngine, capsys: Captured) -> None:
    up(engine)
    [first] = engine.containers
    assert up(engine) == 0
    printed = capsys.readouterr().out
    assert "is already up since" in printed
    assert "with 0 sessions" in printed
    assert "to renew it" not in printed
    assert list(engine.containers) == [first]


def test_up_says_when_the_one_that_runs_is_of_an_older_image(engine: FakeEngine, capsys: Captured) -> None:
    up(engine)
    engine.failures["create_container"] = [ProviderError("Conflict. The name is already in use")]
    up(engine, image="fake:2")
    assert "to renew it: rlm-sandbox down default && rlm-sandbox up default" in capsys.readouterr().out


def test_down_removes_all_of_it_and_is_idempotent(engine: FakeEngine, runtime: RuntimeDir, capsys: Captured) -> None:
    up(engine)
    assert daemon.down("default", connect=engine.connect) == 0
    assert engine.containers == {}
    assert left_over(runtime) == []
    assert daemon.down("default", connect=engine.connect) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert not engine.connected


def test_down_of_one_that_cannot_be_removed_is_an_error(engine: FakeEngine, runtime: RuntimeDir) -> None:
    up(engine)
    engine.failures["remove"] = [ProviderError("device or resource busy")]
    with pytest.raises(ProviderError, match="busy"):
        daemon.down("default", connect=engine.connect)
    assert len(left_over(runtime)) == 2


def rows(text: str) -> list[list[str]]:
    """Cells of a table's lines after its heading; columns are two spaces apart."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()[1:]]


def test_status_lists_named_and_owned_ones(engine: FakeEngine, provider: DockerProvider, capsys: Captured) -> None:
    up(engine)
    owned = provider.start(SETTINGS)
    capsys.readouterr()
    assert daemon.status(connect=engine.connect) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("NAME")
    found = {cells[0]: cells for cells in rows(printed)}
    assert set(found) == {"default", owned.name}
    assert found["default"][1] == "running"
    assert found["default"][3:6] == ["0", "1 GiB", "fake:1"]
    assert found["default"][6] == "rlm-sandbox up"
    assert found[owned.name][6].startswith("process ")


def test_status_tells_an_end_and_a_silence(engine: FakeEngine, capsys: Captured) -> None:
    up(engine, "ended")
    up(engine, "silent")
    ended, silent = engine.containers.values()
    ended.end(137, oom=True)
    silent.end(0)
    silent.state.update(Running=True, Status="running")
    capsys.readouterr()
    daemon.status(connect=engine.connect)
    found = {cells[0]: cells for cells in rows(capsys.readouterr().out)}
    assert found["ended"][1] == "ended: oom"
    assert found["ended"][3] == "-"
    assert found["silent"][1] == "no answer"


def test_status_of_nothing_says_how_to_start_one(engine: FakeEngine, capsys: Captured) -> None:
    assert daemon.status(connect=engine.connect) == 0
    assert "rlm-sandbox up" in capsys.readouterr().out


def test_a_missing_engine_is_the_commands_error(engine: FakeEngine) -> None:
    for command in (
        lambda: daemon.status(connect=engine.connect),
        lambda: daemon.down("default", connect=engine.connect),
        lambda: daemon.logs("default", connect=engine.connect),
        lambda: up(engine),
    ):
        engine.failures["connect"] = [EngineUnavailable("no engine")]
        with pytest.raises(EngineUnavailable):
            command()


@pytest.mark.parametrize("follow", [False, True])
def test_logs_are_readable_and_cannot_steer_the_terminal(engine: FakeEngine, capsys: Captured, follow: bool) -> None:
    up(engine)
    [container] = engine.containers.values()
    container.log = "\n".join(
        [
            json.dumps({"at": 1_800_000_000.5, "from": "broker", "event": "session_opened", "session": "s1", "n": 3}),
            json.dumps({"at": 1_800_000_001, "from": "broker", "event": "defect", "traceback": "Trace:\n  File x\n"}),
            "plain text \x1b[2J",
            json.dumps({"event": "evil\x1b]0;x\x07", "text": "two words"}),
            "last line without an end",
        ]
    )
    capsys.readouterr()
    assert daemon.logs("default", follow, connect=engine.connect) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "session_opened" in lines[0]
    assert lines[0].endswith("session=s1 n=3")
    assert lines[0].startswith("2027-01-1")
    assert lines[2:4] == ["      Trace:", "        File x"]
    assert 'text="two words"' in printed
    assert lines[-1] == "last line without an end"
    assert "\x1b" not in printed
    assert "\x07" not in printed


def test_logs_of_one_that_has_ended_are_still_there(engine: FakeEngine, capsys: Captured) -> None:
    up(engine)
    [container] = engine.containers.values()
    container.end(1)
    capsys.readouterr()
    daemon.logs("default", connect=engine.connect)
    assert "listening" in capsys.readouterr().out


def test_logs_of_nobody_are_an_error_with_the_command(engine: FakeEngine) -> None:
    with pytest.raises(UnknownSandbox, match="rlm-sandbox status"):
        daemon.logs("nobody", connect=engine.connect)


def shell(engine: FakeEngine, **keywords: Any) -> list[tuple[str, list[str]]]:
    executed: list[tuple[str, list[str]]] = []
    daemon.devsh(
        "default",
        connect=engine.connect,
        which=lambda _: "/bin/docker",
        execute=lambda path, argv: executed.append((path, argv)),
        **keywords,
    )
    return executed


def test_the_shell_runs_under_a_uid_of_this_sandbox_that_no_session_has(engine: FakeEngine) -> None:
    up(engine)
    [container] = engine.containers.values()
    config = json.loads(container.keywords["command"][0])
    [(path, argv)] = shell(engine)
    assert path == "/bin/docker"
    assert argv[:2] == ["docker", "exec"]
    assert argv[-3:] == [container.container_id, "bash", "--norc"]
    uid = int(argv[argv.index("-u") + 1].split(":")[0])
    assert config["guest_uid_base"] + 2 * config["max_sessions"] <= uid < config["guest_uid_base"] + UIDS_PER_SANDBOX


def test_the_shell_starts_the_sandbox_where_it_does_not_run(
    engine: FakeEngine, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLM_SANDBOX_IMAGE", "fake:1")
    [(_, argv)] = shell(engine)
    assert list(engine.containers) == [argv[-3]]
    assert "is not running: starting it" in capsys.readouterr().out


def test_without_the_docker_command_the_shell_says_what_to_install(engine: FakeEngine) -> None:
    with pytest.raises(SetupError, match="apt-get install"):
        daemon.devsh("default", connect=engine.connect, which=lambda _: None)
