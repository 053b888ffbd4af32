"""A session that has lost its state never answers as if it had kept it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.testing import InProcessBroker
from host_client import SandboxInterpreter, SandboxSettings
from host_client.errors import SessionLost, UnknownSession
from host_client.journal import SqliteJournal
from host_client.providers.fake import FakeProvider

SETTINGS = SandboxSettings(journal=":memory:")


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as started:
        yield started


def attach(broker: InProcessBroker, address: str) -> SandboxInterpreter:
    return SandboxInterpreter.attach(address, provider=FakeProvider(broker), settings=SETTINGS)


def kill_worker(broker: InProcessBroker, interpreter: SandboxInterpreter) -> None:
    """Kill it between two executions; return once the broker knows."""
    os.kill(interpreter.execute("import os\nos.getpid()"), signal.SIGKILL)
    path, reply = f"/v1/sessions/{interpreter.session_id}/claims", {}
    while "error" not in reply:  # the first answer may be the end of that execution, of which the host knew before
        status, reply, _ = broker.host.request("POST", path, {"wait_s": 20})
    assert (status, reply["error"]["reason"]) == (410, "killed")


@pytest.fixture
def lost(broker: InProcessBroker) -> Iterator[SandboxInterpreter]:
    """One whose worker has died while nobody looked."""
    with SandboxInterpreter(session="mine", provider=FakeProvider(broker), settings=SETTINGS) as made:
        made.execute("kept = 1")
        kill_worker(broker, made)
        yield made


def test_its_host_is_told_at_the_next_execution_and_at_every_later_one(lost: SandboxInterpreter) -> None:
    for code in ("kept", "kept = 2", "kept"):
        with pytest.raises(SessionLost) as told:
            lost.execute(code)
        assert told.value.reason == "killed"


@pytest.mark.parametrize("address", ["mine", "in-process", "in-process/mine", "its id"])
def test_who_attaches_is_told_why_it_is_lost(broker: InProcessBroker, lost: SandboxInterpreter, address: str) -> None:
    with pytest.raises(SessionLost) as told:
        attach(broker, (lost.session_id or "") if address == "its id" else address)
    assert told.value.reason == "killed"


@pytest.mark.parametrize("address", ["mine", "in-process"])
def test_a_living_session_of_the_same_name_is_meant(
    broker: InProcessBroker, lost: SandboxInterpreter, address: str
) -> None:
    with SandboxInterpreter(session="mine", provider=FakeProvider(broker), settings=SETTINGS) as living:
        living.execute("kept = 3")
        assert attach(broker, address).execute("kept") == 3


def test_one_that_was_closed_is_unknown(broker: InProcessBroker, lost: SandboxInterpreter) -> None:
    lost.shutdown()
    with pytest.raises(UnknownSession):
        attach(broker, "mine")


def test_a_stored_reply_of_a_lost_session_is_not_given_as_new(
    broker: InProcessBroker, lost: SandboxInterpreter
) -> None:
    path = f"/v1/sessions/{lost.session_id}/executions?wait_s=20"
    replies: list[dict[str, Any]] = [
        broker.host.request("POST", path, {"execution_id": "new", "code": "1"})[1] for _ in range(2)
    ]
    assert [reply["error"]["code"] for reply in replies] == ["session_lost"] * 2


def test_a_tool_that_outlives_its_session_leaves_no_descriptor(broker: InProcessBroker, tmp_path: Path) -> None:
    entered: list[threading.Thread] = []
    release = threading.Event()

    def outlive(pid: int) -> None:
        entered.append(threading.current_thread())
        os.kill(pid, signal.SIGKILL)
        release.wait(20)

    journal = SqliteJournal(tmp_path / "journal.sqlite3")
    with SandboxInterpreter({"outlive": outlive}, provider=FakeProvider(broker), journal=journal) as interpreter:
        with pytest.raises(SessionLost):
            interpreter.execute("import os\noutlive(os.getpid())")
        release.set()
        entered[0].join(20)
        assert not any(str(tmp_path) in target for target in _open_files())
        assert [record.state for record in journal.calls(10)] == ["done"], "it noted its end"
        journal.close()


def _open_files() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed them
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found
