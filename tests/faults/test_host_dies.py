"""SIGKILL and SIGSTOP of the host at every step of a call; another process goes on with the session."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.testing import InProcessBroker
from host_client import SandboxInterpreter
from host_client.journal import SqliteJournal
from host_client.providers.fake import FakeProvider
from tests.faults.seams import Step, count, counting

ANSWERED, UNKNOWN = "DONE", "ToolOutcomeUnknown"

#: Step: what generated code sees, and COUNT after the successor has gone on. Undeclared tools first.
UNDECLARED = {
    Step.CLAIM_UNREAD: (ANSWERED, 1),
    Step.CLAIMED: (ANSWERED, 1),
    Step.INTENDED: (UNKNOWN, 0),
    Step.MID_TOOL: (UNKNOWN, 1),
    Step.RAN: (UNKNOWN, 1),
    Step.RECORDED: (ANSWERED, 1),
    Step.REPLY_LOST: (ANSWERED, 1),
    Step.ACKNOWLEDGED: (ANSWERED, 1),
}
IDEMPOTENT = {
    Step.CLAIM_UNREAD: (ANSWERED, 1),
    Step.MID_TOOL: (ANSWERED, 2),
    Step.RAN: (ANSWERED, 2),
    Step.RECORDED: (ANSWERED, 1),
    Step.REPLY_LOST: (ANSWERED, 1),
    Step.ACKNOWLEDGED: (ANSWERED, 1),
}
CASES = [(lane, False, step, *expected) for lane in (False, True) for step, expected in UNDECLARED.items()]
CASES += [(lane, True, step, *expected) for lane in (False, True) for step, expected in IDEMPOTENT.items()]
CASES += [(True, idempotent, Step.TOLD_BROKER, ANSWERED, 1) for idempotent in (False, True)]

LATE = (Step.REPLY_LOST, Step.ACKNOWLEDGED)


def may_run_late(step: Step, idempotent: bool) -> int:
    """A stopped host that wakes up runs a tool that it had already recorded as begun, or that is idempotent."""
    return int(step is (Step.CLAIM_UNREAD if idempotent else Step.INTENDED))


@pytest.fixture(scope="module")
def box() -> Iterator[InProcessBroker]:
    with InProcessBroker() as broker:
        yield broker


@contextlib.contextmanager
def struck_host(spec: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Start a host, and wait until it was killed or stopped at its step."""
    command = [sys.executable, "-m", "tests.faults.host", json.dumps(spec)]
    host = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        if spec["signal"] == signal.SIGSTOP:
            _, status = os.waitpid(host.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), "the host ended without being stopped"
        else:
            assert host.wait(60) == -signal.SIGKILL, "the host was not killed at its step"
        yield host
    finally:
        host.kill()
        host.communicate()


@pytest.mark.parametrize("signal_sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("on_lane", "idempotent", "step", "seen", "runs"), CASES)
def test_a_session_goes_on_wherever_its_host_was_struck(
    box: InProcessBroker,
    tmp_path: Path,
    on_lane: bool,
    idempotent: bool,
    step: Step,
    seen: str,
    runs: int,
    signal_sent: signal.Signals,
) -> None:
    counter, journal = tmp_path / "counter", tmp_path / "journal.sqlite3"
    spec = {
        "session": tmp_path.name,
        "socket": str(box.host_socket),
        "journal": str(journal),
        "counter": str(counter),
        "idempotent": idempotent,
        "on_lane": on_lane,
        "step": step.value,
        "signal": signal_sent,
    }
    with struck_host(spec) as host:
        successor = SandboxInterpreter.attach(
            tmp_path.name,
            tools={"effect": counting(counter)},
            idempotent=["effect"] if idempotent else [],
            provider=FakeProvider(box),
            journal=SqliteJournal(journal),
        )
        with successor:
            assert successor.resume() == f"under way\n{seen}"
            assert successor.resume() is None, "a reply is given once"
            assert count(counter) == runs
            assert successor.execute("before, answer") == ["kept", seen]  # ALIVE
            if signal_sent == signal.SIGSTOP:
                host.send_signal(signal.SIGCONT)
                ended = host.communicate(timeout=60)[0]
                # Where the execution had ended before anybody attached, its reply had reached the old host too.
                assert ended in (
                    ("session_lost fenced\n", "finished\n") if step in LATE else ("session_lost fenced\n",)
                )
                assert count(counter) in {runs, runs + may_run_late(step, idempotent)}
                assert successor.execute("before") == "kept"  # the fenced host's shutdown ended nothing
