"""The host's side of endings: two owners, re-entry, shutdowns at bad moments, and that nothing is left."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host_client import SandboxInterpreter, SandboxSettings
from host_client.engine import connect_engine
from host_client.errors import SessionBusy, SessionLost
from host_client.providers.container_spec import LABEL, LABEL_DIRECTORY
from host_client.runtime_dir import RuntimeDir
from tests.adversarial.arena import LIMITS, PRELUDE, Arena

pytestmark = [pytest.mark.docker, pytest.mark.family("lifecycle")]

_SOON_S = 10.0


@pytest.fixture
def settings(image: str) -> SandboxSettings:
    return SandboxSettings(image=image, **LIMITS)


def _raised_in(call: Any) -> list[Exception]:
    """Run something that must raise, and return what it raised."""
    try:
        call()
    except Exception as error:
        return [error]
    return []


def test_a_tool_that_executes_in_its_own_session_is_refused_and_nothing_hangs(settings: SandboxSettings) -> None:
    refused: list[Exception] = []
    with SandboxInterpreter(
        {"again": lambda: refused.extend(_raised_in(lambda: made.execute("1")))}, settings=settings
    ) as made:
        made.execute("x = 7\nagain()")
        assert made.execute("x") == 7
    assert [type(error).__mro__.count(SessionBusy) for error in refused] == [1]


@pytest.mark.parametrize("where", ["a tool", "another thread"])
def test_a_shutdown_in_the_middle_ends_the_execution_typed(where: str, settings: SandboxSettings) -> None:
    runs: list[str] = []
    closing: list[threading.Thread] = []

    def end() -> None:
        runs.append(where)
        if where == "a tool":
            made.shutdown()
        else:
            closing.append(threading.Thread(target=made.shutdown))
            closing[0].start()

    made = SandboxInterpreter({"end": end}, settings=settings)
    with pytest.raises(SessionLost) as lost:
        made.execute("end()\nimport time\nwhile True: time.sleep(1)")
    for thread in closing:
        thread.join(_SOON_S)
        assert not thread.is_alive()
    assert lost.value.reason == "shutdown"
    assert runs == [where]


@pytest.mark.parametrize("when", ["idle", "executing", "in a tool"])
def test_a_container_that_is_killed_is_told_as_such(when: str, settings: SandboxSettings) -> None:
    runs = 0

    def kill() -> None:
        nonlocal runs
        runs += 1
        handle = made.sandbox_handle
        assert handle is not None
        with connect_engine() as engine:
            engine._quick.kill(handle.sandbox_id)

    made = SandboxInterpreter({"kill": kill}, settings=settings)
    try:
        made.execute("x = 1")
        if when == "idle":
            kill()
        killer = threading.Timer(0.3, kill)
        if when == "executing":
            killer.start()
        with pytest.raises(SessionLost) as lost:
            made.execute({"idle": "x", "executing": "while True: pass", "in a tool": "kill()"}[when])
        assert lost.value.reason == "killed"
        killer.cancel()
        with pytest.raises(SessionLost):
            made.execute("x")
        assert runs == 1
    finally:
        made.shutdown()


def test_a_session_of_a_killed_worker_leaves_the_others_of_its_sandbox(arena: Arena) -> None:
    name = arena.shared()
    first, second = (
        SandboxInterpreter(settings=arena.settings, provider=arena.provider, sandbox=name) for _ in range(2)
    )
    with first, second:
        second.execute("x = 7")
        with pytest.raises(SessionLost):
            first.execute("import os; os.kill(os.getpid(), 9)")
        assert second.execute("x") == 7


@pytest.fixture
def own_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setenv("RLM_SANDBOX_RUNTIME_DIR", f"{name}/r")
        yield Path(name) / "r"


_LAST_WORDS = {
    "a daemon": "subprocess.Popen(['sleep', '1000'], start_new_session=True)",
    "a hundred daemons that ignore signals": """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(100):
    if os.fork() == 0:
        os.setsid(); threading.Event().wait()""",
    "threads": "for _ in range(50): threading.Thread(target=threading.Event().wait, daemon=False).start()",
    "a loop at its end": "import atexit; atexit.register(lambda: [0 for _ in iter(int, 1)])",
    "files that resist": "os.makedirs('/tmp/a' + '/b' * 300); os.chmod('/tmp/a', 0)",
    "connections": "held = [connect(GUEST_SOCKET) for _ in range(500)]",
    "a death": "os._exit(9)",
}


@pytest.mark.parametrize("left", _LAST_WORDS)
def test_nothing_is_left_of_a_sandbox_with(left: str, own_runtime: Path, settings: SandboxSettings) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    made = SandboxInterpreter({"tally": lambda: 1}, settings=settings)
    made.execute(PRELUDE)
    handle = made.sandbox_handle
    assert handle is not None
    with connect_engine() as engine:
        pid = engine.inspect(handle.sandbox_id)["State"]["Pid"]
        try:
            made.execute(f"tally()\n{_LAST_WORDS[left]}")
        except SessionLost:
            assert left == "a death"
        made.shutdown(wait=True)
        assert not os.path.exists(f"/proc/{pid}"), "PID 1's end takes every process of its namespace along"
        assert [c for c in engine.list({LABEL: "1"}) if c["Labels"][LABEL_DIRECTORY].startswith(str(own_runtime))] == []
    runtime = RuntimeDir.open()
    assert sorted(path.name for path in runtime.path.iterdir()) == ["lock", "uids"]
    assert list((runtime.path / "uids").iterdir()) == []
    assert threading.active_count() <= threads + 1, "the engine's client may keep one"
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
