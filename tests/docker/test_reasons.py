"""Each way in which a session can end has a name, told at once and from then on; a new session works."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest

from host_client import SandboxInterpreter, SandboxSettings
from host_client.engine import connect_engine
from host_client.errors import EngineUnavailable, SessionLost
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.runtime_dir import RuntimeDir
from tests.docker.sandboxes import engine, image, leaks, provider, runtime, settings

pytestmark = pytest.mark.docker

__all__ = ["engine", "image", "provider", "runtime", "settings"]

#: From the deadline on: the interrupt's grace, and what a busy machine adds.
DEADLINE_S, TOLD_WITHIN_S = 1.0, 6.0

#: What generated code does to itself, by the reason that its end is told with.
BY_ITSELF = {
    "oom": "hoard = [b'x' * (1 << 20) for _ in range(4096)]",
    "killed": "os.kill(os.getpid(), 9)",
    "deadline": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\nwhile True: pass",
    "crashed(SIGSEGV)": "import ctypes\nctypes.string_at(0)",
    "crashed(SIGABRT)": "os.abort()",
    "exited(3)": "os._exit(3)",
    "protocol": "import stat\n"
    "for fd in map(int, os.listdir('/proc/self/fd')):\n"
    "    try:\n"
    "        if stat.S_ISSOCK(os.fstat(fd).st_mode): os.write(fd, b'\\xff' * 64)\n"
    "    except OSError: pass\n"
    "time.sleep(60)",
}


def ends_as(interpreter: SandboxInterpreter, code: str, reason: str) -> None:
    """Check that this code ends the session for this reason, and that every later call says so too."""
    began = time.monotonic()
    for attempt in (code, "kept"):
        with pytest.raises(SessionLost) as lost:
            interpreter.execute(attempt)
        assert lost.value.reason == reason
    assert time.monotonic() - began < DEADLINE_S + TOLD_WITHIN_S


@pytest.mark.parametrize("reason", BY_ITSELF)
def test_what_generated_code_does_to_itself_is_named(
    reason: str, provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    small = dataclasses.replace(settings, memory=128 << 20)
    deadline_s = DEADLINE_S if reason == "deadline" else 60.0
    with SandboxInterpreter(settings=small, provider=provider, execution_timeout_s=deadline_s) as interpreter:
        interpreter.execute("import os, time\nkept = 1")
        ends_as(interpreter, BY_ITSELF[reason], reason)
    with SandboxInterpreter(settings=small, provider=provider) as another:
        assert another.execute("'kept' in globals()") is False
    assert leaks(engine, runtime) == []


def test_a_container_that_somebody_removes_is_told_as_removed(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    with SandboxInterpreter(settings=settings, provider=provider) as interpreter:
        interpreter.tools["remove"] = lambda: engine.remove(_id(interpreter))
        ends_as(interpreter, "remove()\nimport time; time.sleep(60)", "removed")
    assert leaks(engine, runtime) == []


def test_an_engine_that_stops_with_its_sandboxes_is_told_and_what_it_leaves_is_removed_later(
    settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    connecting = _Switch()
    provider = DockerProvider(connect=connecting)
    with SandboxInterpreter(settings=settings, provider=provider) as interpreter:

        def stop_engine() -> None:
            connecting.engine_is_there = False
            engine.kill(_id(interpreter))

        interpreter.tools["stop_engine"] = stop_engine
        ends_as(interpreter, "stop_engine()\nimport time; time.sleep(60)", "engine_gone")
    assert leaks(engine, runtime), "nobody could remove it"
    connecting.engine_is_there = True
    provider.stop_all_owned()
    assert leaks(engine, runtime) == []


class _Switch:
    """Connects to the engine, and speaks to it, until it is said to be gone."""

    engine_is_there = True

    def __call__(self) -> Any:
        self._check()
        return _Cuttable(connect_engine(), self._check)

    def _check(self) -> None:
        if not self.engine_is_there:
            raise EngineUnavailable("the engine was stopped")


class _Cuttable:
    def __init__(self, engine: DockerEngine, check: Callable[[], None]) -> None:
        self._engine, self._check = engine, check

    def __getattr__(self, name: str) -> Any:
        if name != "close":
            self._check()
        return getattr(self._engine, name)


def _id(interpreter: SandboxInterpreter) -> str:
    assert interpreter.sandbox_handle is not None
    return interpreter.sandbox_handle.sandbox_id
