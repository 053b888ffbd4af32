"""When the broker dies, the sandbox ends with it, and the engine can tell why."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_client import SandboxInterpreter, SandboxSettings
from host_client.errors import SessionLost
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.runtime_dir import RuntimeDir, broker_uid
from tests.docker.sandboxes import engine, image, runtime, settings

pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it reaches for the broker from outside"),
]

__all__ = ["engine", "image", "runtime", "settings"]


@pytest.fixture
def interpreter(settings: SandboxSettings, runtime: RuntimeDir) -> Iterator[SandboxInterpreter]:
    # The kernel must find the limit before /tmp is full.
    small = dataclasses.replace(settings, memory=128 << 20, tmpfs=256 << 20)
    with SandboxInterpreter(settings=small, provider=DockerProvider()) as made:
        made.execute("kept = 1")
        yield made


def broker_of(interpreter: SandboxInterpreter, engine: DockerEngine) -> int:
    """The broker's pid, as the host sees it."""
    assert interpreter.sandbox_handle is not None
    first = engine.inspect(interpreter.sandbox_handle.sandbox_id)["State"]["Pid"]
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    [broker] = [int(pid) for pid in children if os.stat(f"/proc/{pid}").st_uid in (broker_uid(), 0) and _is_broker(pid)]
    return broker


def _is_broker(pid: str) -> bool:
    return b"\0broker\0" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_broker_that_is_killed_ends_the_sandbox_as_killed(
    interpreter: SandboxInterpreter, engine: DockerEngine
) -> None:
    os.kill(broker_of(interpreter, engine), signal.SIGKILL)
    with pytest.raises(SessionLost) as lost:
        interpreter.execute("kept")
    assert lost.value.reason == "killed"


def test_a_broker_that_crashes_ends_the_sandbox_as_crashed(
    interpreter: SandboxInterpreter, engine: DockerEngine
) -> None:
    broker = broker_of(interpreter, engine)
    ended = os.pidfd_open(broker)
    os.kill(broker, signal.SIGSEGV)
    select.select([ended], [], [], 20)
    os.close(ended)
    with pytest.raises(SessionLost) as lost:
        interpreter.execute("kept")
    assert lost.value.reason == "crashed(SIGSEGV)"


def test_a_broker_that_runs_out_of_memory_ends_the_sandbox_as_oom(
    interpreter: SandboxInterpreter, engine: DockerEngine
) -> None:
    broker = broker_of(interpreter, engine)
    # A session is killed first, as it should be; here the broker is made the one.
    Path(f"/proc/{broker}/oom_score_adj").write_text("1000")
    with pytest.raises(SessionLost) as lost:
        interpreter.execute("import os\nwith open('/tmp/big', 'wb') as file:\n while True: file.write(bytes(1 << 20))")
    assert lost.value.reason == "oom"
