"""Claims about the command's front: what it delegates, and how errors end."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from host_client import cli, engine, image
from host_client.errors import EngineUnavailable, ImageMissing
from host_client.settings import SandboxSettings


class Recorder:
    """Stands for a module of functions: records calls and returns a status."""

    def __init__(self, status: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.returns = status

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            return self.returns

        return call


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder: Any = Recorder()
    import host_client

    monkeypatch.setitem(sys.modules, "host_client.daemon", recorder)
    monkeypatch.setattr(host_client, "daemon", recorder, raising=False)
    monkeypatch.setattr(cli, "prepare", lambda *_: recorder.calls.append(("prepare",)))
    return recorder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["down"], [("down", "default")]),
        (["down", "mine"], [("down", "mine")]),
        (["status"], [("status",)]),
        (["logs", "mine", "-f"], [("logs", "mine", True)]),
        (["devsh"], [("prepare",), ("devsh", "default")]),
        (["up", "mine"], [("prepare",), ("up", "mine", SandboxSettings())]),
        (["setup"], [("prepare",)]),
    ],
)
def test_each_command_calls_its_function_and_prepares_only_where_it_must(
    daemon: Recorder, arguments: list[str], expected: list[tuple[Any, ...]]
) -> None:
    assert cli.main(arguments) == 0
    assert daemon.calls == expected


def test_a_command_s_status_is_the_exit_status(daemon: Recorder) -> None:
    daemon.returns = 3
    assert cli.main(["status"]) == 3


def test_the_demo_reads_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    demo: Any = Recorder()
    import host_client

    monkeypatch.setitem(sys.modules, "host_client.demo", demo)
    monkeypatch.setattr(host_client, "demo", demo, raising=False)
    monkeypatch.setattr(cli, "prepare", lambda *_: None)
    assert cli.main(["demo", "--fast"]) == 0
    assert demo.calls == [("main", ["--fast"])]


def test_an_error_of_ours_is_printed_with_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise EngineUnavailable("No engine.", help="start it")

    monkeypatch.setattr(cli, "prepare", fail)
    assert cli.main(["setup"]) == 1
    assert capsys.readouterr().err == "error: No engine.\n  start it\n"


def test_a_bad_setting_is_an_error_of_ours_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLM_SANDBOX_MEMORY", "plenty")
    assert cli.main(["setup"]) == 1
    assert "RLM_SANDBOX_MEMORY" in capsys.readouterr().err


def test_ctrl_c_ends_without_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "prepare", interrupt)
    assert cli.main(["setup"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


class FakeEngine:
    """An engine with one container of ours."""

    url = "unix:///fake"

    def __init__(self) -> None:
        self.removed: list[str] = []

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def version(self) -> dict[str, str]:
        return {"Version": "20.10"}

    def list(self, labels: dict[str, str]) -> list[dict[str, Any]]:
        return [{"Id": "abc", "Labels": {}}]

    def remove(self, container_id: str) -> None:
        self.removed.append(container_id)


def test_image_prints_the_tag_alone_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "ensure_engine", lambda _: FakeEngine())
    monkeypatch.setattr(image, "ensure_image", lambda *_, **__: "rlm-sandbox:123")
    assert cli.main(["image"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "rlm-sandbox:123\n"
    assert "Docker 20.10" in printed.err


def test_clean_says_what_it_removes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    fake = FakeEngine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("host_client.bubblewrap.commands.remove_all", list)
    (tmp_path / "rlm-sandbox").mkdir()
    monkeypatch.setattr(engine, "connect_engine", lambda: fake)
    monkeypatch.setattr(image, "remove_images", lambda _: ["rlm-sandbox:123"])
    assert cli.main(["clean"]) == 0
    assert fake.removed == ["abc"]
    assert not (tmp_path / "rlm-sandbox").exists()
    assert capsys.readouterr().out.count("[clean] removed") == 3


def test_clean_without_an_engine_still_clears_the_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    def fail() -> None:
        raise ImageMissing("nothing")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("host_client.bubblewrap.commands.remove_all", list)
    monkeypatch.setattr(engine, "connect_engine", fail)
    assert cli.main(["clean"]) == 0
    assert "not looked at" in capsys.readouterr().out


def test_help_needs_neither_engine_nor_dspy() -> None:
    code = "import sys; from host_client import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'docker', 'dspy', 'requests'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
