"""Claims about an interpreter that owns its container, from start to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_client import SandboxInterpreter, SandboxSettings, wait_for_endings
from host_client.engine import connect_engine
from host_client.errors import EngineUnavailable, SessionLost, UnknownSandbox
from host_client.image import ensure_image
from host_client.providers.base import SandboxHandle
from host_client.providers.docker_engine import ContainerNotFound, DockerEngine

pytestmark = pytest.mark.docker


@pytest.fixture
def settings() -> SandboxSettings:
    try:
        return SandboxSettings(image=ensure_image(SandboxSettings(), print))
    except EngineUnavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no engine: {error.message}")


@pytest.fixture
def engine() -> Iterator[DockerEngine]:
    with connect_engine() as connected:
        yield connected


def _handle(interpreter: SandboxInterpreter) -> SandboxHandle:
    handle = interpreter.sandbox_handle
    assert handle is not None
    return handle


def _nothing_is_left(engine: DockerEngine, handle: SandboxHandle) -> bool:
    assert wait_for_endings(60)
    with pytest.raises(ContainerNotFound):
        engine.inspect(handle.sandbox_id)
    return not Path(handle.socket_path).parent.exists()


def test_a_container_of_its_own_that_ends_with_it(settings: SandboxSettings, engine: DockerEngine) -> None:
    with SandboxInterpreter(settings=settings, tools={"double": lambda n: n * 2}) as interpreter:
        handle = _handle(interpreter)
        assert engine.inspect(handle.sandbox_id)["State"]["Running"]
        assert interpreter.execute("double(21)") == 42
    assert _nothing_is_left(engine, handle)


def test_two_interpreters_of_a_factory_have_two_containers(settings: SandboxSettings) -> None:
    factory = SandboxInterpreter.factory(settings=settings)
    with factory() as one, factory() as two:
        assert _handle(one).sandbox_id != _handle(two).sandbox_id


def test_a_killed_container_is_reported_at_once_and_leaves_nothing(
    settings: SandboxSettings, engine: DockerEngine
) -> None:
    interpreter = SandboxInterpreter(settings=settings)

    def kill() -> None:
        os.kill(engine.inspect(_handle(interpreter).sandbox_id)["State"]["Pid"], signal.SIGKILL)

    interpreter.tools["kill"] = kill
    interpreter.start()
    handle = _handle(interpreter)
    for _ in range(2):
        with pytest.raises(SessionLost) as caught:
            interpreter.execute("kill()\nwhile True: pass")
        assert caught.value.reason in ("killed", "exited(137)")
    assert _nothing_is_left(engine, handle)


def test_a_name_that_nobody_has_is_an_error_with_the_command_that_helps(settings: SandboxSettings) -> None:
    with pytest.raises(UnknownSandbox, match="rlm-sandbox up nobody-has-this"):
        SandboxInterpreter(settings=settings, sandbox="nobody-has-this").start()
