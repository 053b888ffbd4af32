"""``rlm-sandbox sessions`` for people: columns that fit, nothing that steers the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import pytest

from broker.testing import InProcessBroker
from host_client import SandboxInterpreter, SandboxSettings, SessionStatus, sessions_view
from host_client.cli import main
from host_client.providers.choice import provider_for
from host_client.providers.fake import FakeProvider

SETTINGS = SandboxSettings(journal=":memory:", history=False)

IDLE = SessionStatus(
    name="novel",
    session_id="s-0123456789abcdef",
    sandbox="default",
    state="idle",
    lost=None,
    age_s=10_800,
    idle_s=7_200,
    ttl_s=28_800,
    ends_in_s=21_600,
    holder=None,
    holder_pid=None,
    holder_gone=False,
    kept=True,
    executions=12,
    memory_bytes=84 << 20,
)
RUNNING = dataclasses.replace(
    IDLE, name=None, state="running", ttl_s=None, ends_in_s=None, holder="evaluate.py", holder_pid=4711
)
LOST = dataclasses.replace(
    IDLE,
    name="a-name-of-sixty-four-characters-" * 2,
    sandbox="a-sandbox-with-a-long-name",
    state="lost",
    lost="crashed(SIGSEGV)",
    ends_in_s=None,
    memory_bytes=None,
    holder="\x1b[31mpipeline_that_has_a_long_name.py",
    holder_pid=4_194_303,
    holder_gone=True,
)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_a_table_fits_and_keeps_what_matters(width: int) -> None:
    lines = sessions_view.table([IDLE, RUNNING, LOST], width)
    assert max(map(len, lines)) <= max(width, 80)
    heading, idle, running, lost = (line.split() for line in lines)
    assert heading == ["NAME", "SANDBOX", "STATE", "AGE", "IDLE", "ENDS", "IN", "RUNS", "MEMORY", "HELD", "BY"]
    assert [idle[0], idle[2:]] == ["novel", ["idle", "3", "h", "2", "h", "6", "h", "12", "84", "MiB", "nobody"]]
    assert running[0].startswith("s-0123456")
    assert "running" in running
    assert "lost:" in lost
    assert not any("\x1b" in line for line in lines)


def test_a_wide_terminal_shows_everything() -> None:
    lines = sessions_view.table([LOST], 300)
    assert str(LOST.name) in lines[1]
    assert lines[1].endswith("ended: \N{REPLACEMENT CHARACTER}[31mpipeline_that_has_a_long_name.py (4194303)")


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessBroker]:
    """A broker that the command finds."""
    with InProcessBroker() as box:
        monkeypatch.setattr(f"{provider_for.__module__}.provider_for", lambda settings: FakeProvider(box))
        yield box


def test_the_command_says_so_where_there_is_none_and_how_to_open_one(
    broker: InProcessBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sessions"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "no session is open",
        'to open one that stays: SandboxInterpreter.create("NAME", sandbox="default")',
    ]
    assert main(["sessions", "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_the_command_lists_and_closes(broker: InProcessBroker, capsys: pytest.CaptureFixture[str]) -> None:
    provider = FakeProvider(broker)
    SandboxInterpreter.create("novel", sandbox="in-process", provider=provider, settings=SETTINGS).shutdown()
    assert main(["sessions", "--json"]) == 0
    [shown] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (shown["name"], shown["sandbox"], shown["state"], shown["kept"]) == ("novel", "in-process", "idle", True)
    assert main(["sessions"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["novel", "in-process", "idle"]
    assert main(["sessions", "close", "novel"]) == 0
    assert capsys.readouterr().out.startswith("closed in-process/novel: idle, 0 executions, 0 s old")
    assert main(["sessions", "close", "novel"]) == 1
    assert "there is no session 'novel'; there are none" in capsys.readouterr().err


def test_the_command_closes_what_runs_by_force_alone(
    broker: InProcessBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses: list[int] = []

    def close() -> None:
        statuses.append(main(["sessions", "close", "novel"]))

    with SandboxInterpreter.create(
        "novel", sandbox="in-process", provider=FakeProvider(broker), settings=SETTINGS, tools={"close": close}
    ) as interpreter:
        assert interpreter.execute("close(); 1") == 1
    assert statuses == [1]
    assert "--force" in capsys.readouterr().err
    assert main(["sessions", "close", "novel", "--force"]) == 0
