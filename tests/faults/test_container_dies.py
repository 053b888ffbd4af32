"""Worker, broker, supervisor and container die or freeze at every step of a call, on a real engine."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from host_client import SandboxInterpreter, SandboxSettings
from host_client.errors import SessionLost
from host_client.lane import Lane
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.runtime_dir import RuntimeDir, broker_uid
from tests.docker.sandboxes import engine, image, leaks, provider, runtime, settings
from tests.faults.seams import Step, StrikingClient, StrikingJournal, count, counting

__all__ = ["engine", "image", "provider", "runtime", "settings"]

pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(os.geteuid() != 0, reason="signals to processes of other uids need root"),
]

#: It goes on after the call, so that no result can be on its way when the fault strikes.
CODE = "import time\neffect('done')\ntime.sleep(600)"
DEADLINE_S = 1.0
#: From the deadline to the interrupt's grace and the host's own guard, and what a busy machine adds.
DEAD_WITHIN_S = DEADLINE_S + 2 + 5 + 4

Victim = Callable[[int], int]


def inside(first_pid: int) -> list[int]:
    """Pids, on the host, of the processes in a container."""
    namespace = os.readlink(f"/proc/{first_pid}/ns/pid")
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.readlink(folder / "ns" / "pid") == namespace:
                    found.append(int(folder.name))
            except OSError:  # it has just ended
                continue
    return found


def supervisor(first_pid: int) -> int:
    return first_pid


def broker(first_pid: int) -> int:
    [pid] = [pid for pid in inside(first_pid) if uids(pid)[0] == broker_uid()]
    return pid


def worker(first_pid: int) -> int:
    [pid] = [pid for pid in inside(first_pid) if pid != first_pid and uids(pid)[0] not in (0, broker_uid())]
    return pid


def uids(pid: int) -> list[int]:
    """Real and effective uid; an undumpable process's files in /proc belong to root."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:"))
    return [int(uid) for uid in line.split()[1:3]]


class StrikingDocker:
    """A real provider whose clients strike at a step; what it does not say is the provider's."""

    def __init__(self, provider: DockerProvider, strike: Callable[[Step], None]) -> None:
        self._provider, self._strike = provider, strike

    def connect(self, handle: object) -> StrikingClient:
        return StrikingClient(handle.socket_path, self._strike)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._provider, name)


class Scene:
    """One interpreter with a counted tool, and a fault that strikes once at a step of its call."""

    def __init__(self, provider: DockerProvider, settings: SandboxSettings, tmp_path: Path, step: Step) -> None:
        self.counter = tmp_path / "counter"
        self.fault: Callable[[], None] | None = None
        self._step, work = step, counting(self.counter)

        def effect(text: str) -> str:
            answer = work(text)
            self._strike(Step.MID_TOOL)
            return answer

        self.interpreter = SandboxInterpreter(
            tools={"effect": effect},
            execution_timeout_s=DEADLINE_S,
            settings=settings,
            provider=StrikingDocker(provider, self._strike),  # type: ignore[arg-type]
            journal=StrikingJournal(tmp_path / "journal.sqlite3", self._strike),
        )
        self.interpreter.start()

    @property
    def container(self) -> str:
        handle = self.interpreter.sandbox_handle
        assert handle is not None
        return handle.sandbox_id

    def _strike(self, step: Step) -> None:
        if step is self._step and self.fault is not None:
            fault, self.fault = self.fault, None
            fault()

    def await_run(self) -> None:
        """Wait until the tool has run: a call that was taken runs, also where its session dies meanwhile."""
        give_up_at = time.monotonic() + DEAD_WITHIN_S
        while not count(self.counter):
            assert time.monotonic() < give_up_at, "the tool never ran"
            threading.Event().wait(0.01)

    def dies(self) -> str:
        """DEAD: run the code; return the reason of the loss that it must end with in time."""
        began = time.monotonic()
        with pytest.raises(SessionLost) as lost:
            self.interpreter.execute(CODE)
        assert time.monotonic() - began < DEAD_WITHIN_S
        began = time.monotonic()
        with pytest.raises(SessionLost):
            self.interpreter.execute("1")
        assert time.monotonic() - began < 1, "later calls raise at once"
        assert self.fault is None, "the fault struck"
        return lost.value.reason


#: What its death is called.
VICTIMS: dict[str, tuple[Victim, set[str]]] = {
    "worker": (worker, {"killed"}),
    "broker": (broker, {"killed"}),
    "supervisor": (supervisor, {"killed"}),
}


@pytest.mark.parametrize("step", list(Step))
@pytest.mark.parametrize("victim", list(VICTIMS))
def test_whoever_is_killed_at_whatever_step_the_session_is_lost_and_the_tool_ran_once(
    victim: str,
    step: Step,
    provider: DockerProvider,
    settings: SandboxSettings,
    engine: DockerEngine,
    runtime: RuntimeDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(provider, settings, tmp_path, step)
    if step is Step.TOLD_BROKER:
        tell = Lane._send_soon
        monkeypatch.setattr(Lane, "_send_soon", lambda lane, frame: (scene._strike(step), tell(lane, frame)))
        scene.interpreter.execute("1")  # from here on there is a lane
    find, reasons = VICTIMS[victim]
    pid = find(engine.inspect(scene.container)["State"]["Pid"])
    scene.fault = lambda: os.kill(pid, signal.SIGKILL)
    assert scene.dies() in reasons
    scene.await_run()
    scene.interpreter.shutdown()
    assert count(scene.counter) == 1
    assert leaks(engine, runtime) == []  # NOLEAK


@pytest.mark.parametrize("victim", list(VICTIMS))
def test_whoever_is_stopped_mid_tool_the_session_is_lost_in_time(
    victim: str,
    provider: DockerProvider,
    settings: SandboxSettings,
    engine: DockerEngine,
    runtime: RuntimeDir,
    tmp_path: Path,
) -> None:
    scene = Scene(provider, settings, tmp_path, Step.MID_TOOL)
    pid = VICTIMS[victim][0](engine.inspect(scene.container)["State"]["Pid"])
    scene.fault = lambda: os.kill(pid, signal.SIGSTOP)
    assert scene.dies() in {"deadline", "unresponsive"}
    assert count(scene.counter) == 1
    scene.interpreter.shutdown()
    assert leaks(engine, runtime) == []


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_container_that_the_engine_ends_or_freezes_is_lost_and_another_works(
    how: str,
    provider: DockerProvider,
    settings: SandboxSettings,
    engine: DockerEngine,
    runtime: RuntimeDir,
    tmp_path: Path,
) -> None:
    scene = Scene(provider, settings, tmp_path, Step.MID_TOOL)
    container = scene.container
    scene.fault = lambda: subprocess.run(["docker", how, container], check=True, capture_output=True).check_returncode()
    assert scene.dies() == {"kill": "killed", "pause": "unresponsive"}[how]
    assert count(scene.counter) == 1
    with SandboxInterpreter(settings=settings, provider=provider) as another:
        assert another.execute("6 * 7") == 42
    assert leaks(engine, runtime) == []


def test_a_sandbox_out_of_memory_mid_tool_says_so(
    provider: DockerProvider, image: str, engine: DockerEngine, runtime: RuntimeDir, tmp_path: Path
) -> None:
    small = SandboxSettings(image=image, memory=128 << 20)
    counter = tmp_path / "counter"
    with SandboxInterpreter(tools={"effect": counting(counter)}, settings=small, provider=provider) as interpreter:
        with pytest.raises(SessionLost) as lost:
            interpreter.execute("effect('once')\nhoard = [b'x' * (1 << 20) for _ in range(4096)]")
        assert lost.value.reason == "oom"
        assert count(counter) == 1
    assert leaks(engine, runtime) == []
