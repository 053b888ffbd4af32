"""Secrets on the host plane: they reach the worker of their session, and nothing and nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.messages import OpenRequest
from broker.testing import InProcessBroker

SECRET = "tr0ub4dor&3-in-the-attic"
#: What the process has, what a child of it has, and whether /proc shows it as part of the worker's first environment.
READ = f"""
import os, subprocess, sys
show = "import os; print(os.environ.get('API_KEY', ''))"
child = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True).stdout.strip()
[os.environ.get("API_KEY"), child, {SECRET!r}.encode() in open("/proc/self/environ", "rb").read()]
"""


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker(max_sessions=2) as started:
        yield started


def run(broker: InProcessBroker, session_id: str, code: str) -> Any:
    path = f"/v1/sessions/{session_id}/executions?wait_s=20"
    return broker.host.request("POST", path, {"execution_id": os.urandom(8).hex(), "code": code})[1]["result"]["value"]


def test_a_secret_reaches_its_own_session_and_no_other(broker: InProcessBroker) -> None:
    status, opened, _ = broker.host.request("POST", "/v1/sessions", {"name": "s", "secrets": {"API_KEY": SECRET}})
    assert (status, opened["secrets"]) == (201, ["API_KEY"])
    other = broker.host.request("POST", "/v1/sessions")[1]["session_id"]
    assert run(broker, opened["session_id"], READ) == [SECRET, SECRET, False]
    assert run(broker, other, READ) == [None, "", False]


def test_a_secret_is_in_no_reply_and_no_log(broker: InProcessBroker) -> None:
    opened = broker.host.request("POST", "/v1/sessions", {"name": "s", "secrets": {"API_KEY": SECRET}})[1]
    taken = broker.host.request("POST", "/v1/sessions", {"name": "s", "secrets": {"API_KEY": SECRET}})
    assert taken[0] == 409
    shown = [opened, taken, broker.host.request("GET", "/v1/sessions")]
    broker.stop()
    log = broker.log_path.read_text()
    assert "session_opened" in log
    assert SECRET not in f"{shown}{log}"
    assert SECRET not in repr(OpenRequest(secrets={"API_KEY": SECRET}))


def test_the_supervisor_never_sees_a_secret(broker: InProcessBroker) -> None:
    """Workers are its forks: what it has, later sessions have too."""
    opened = broker.host.request("POST", "/v1/sessions", {"secrets": {"API_KEY": SECRET}})[1]
    supervisor = run(broker, opened["session_id"], "import os; os.getppid()")
    assert not found_in_memory(supervisor, SECRET.encode())
    worker = run(broker, opened["session_id"], "os.getpid()")
    assert found_in_memory(worker, SECRET.encode()), "else this finds nothing anywhere"


def found_in_memory(pid: int, wanted: bytes) -> bool:
    """Look through the writable memory of a process of our own."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            area, rights, *_ = line.split()
            first, end = (int(part, 16) for part in area.split("-"))
            if rights.startswith("rw"):
                memory.seek(first)
                if wanted in memory.read(end - first):
                    return True
    return False


def test_secrets_that_fill_the_channel_arrive_before_the_session_is_open(broker: InProcessBroker) -> None:
    wanted = {f"KEY_{i}": str(i).ljust(32_000, "x") for i in range(8)}
    opened = broker.host.request("POST", "/v1/sessions", {"secrets": wanted})[1]
    code = "import os; sum(len(value) for name, value in os.environ.items() if name.startswith('KEY_'))"
    assert run(broker, opened["session_id"], code) == 8 * 32_000


IMPOSSIBLE: dict[str, Any] = {
    "taken": {"PATH": "/evil/bin"},
    "no name": {"evil=b": "value"},
    "NUL": {"K": "evil\0"},
    "no text": {"K": 1},
    "no UTF-8": {"K": "evil\ud800"},
    "too long": {"K": "evil" * 9_000},
    "too many": {f"K{i}": "evil" for i in range(65)},
    "too much": {f"K{i}": "evil" * 8_000 for i in range(9)},
    "a list": ["evil"],
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_secrets_that_cannot_be_set_are_refused_and_not_shown(broker: InProcessBroker, case: str) -> None:
    status, reply, _ = broker.host.request("POST", "/v1/sessions", {"secrets": IMPOSSIBLE[case]})
    assert (status, reply["error"]["code"]) == (400, "bad_request")
    assert "evil" not in str(reply)
    assert broker.host.request("GET", "/v1/sessions")[1] == {"sessions": []}
