"""What the same claims are tested against: a script, the real broker with real workers, and a real container."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from broker.testing import InProcessBroker
from host_client import SandboxInterpreter, SandboxSettings, ScriptedBroker
from host_client.errors import EngineUnavailable
from host_client.factory import InterpreterFactory
from host_client.providers.base import SandboxHandle, SandboxProvider
from host_client.providers.fake import FakeProvider
from host_client.scripted_broker import ScriptedStep
from host_client.transport import Transport
from tests.conformance.dspy_versions import HAS_FLEX

if TYPE_CHECKING:
    from host_client.providers.docker import DockerProvider

SCRIPTED = "scripted"
IN_PROCESS = "in_process"
DOCKER = "docker"
RELAY = "relay"
BUBBLEWRAP = "bubblewrap"


@dataclasses.dataclass
class Backend:
    """Makes interpreters, and shuts them down when the test is over.

    A test passes the code to an interpreter, and to the backend the steps that a sandbox would give for it:
    the scripted backend follows them, the real ones run the code and ignore them.

    Attributes:
        name: ``scripted``, ``in_process``, ``docker``, ``relay`` or ``bubblewrap``.
        provider: Where the real ones get sandboxes from.
    """

    name: str
    provider: SandboxProvider | None = None
    made: list[SandboxInterpreter] = dataclasses.field(default_factory=list)

    @property
    def real(self) -> bool:
        return self.name != SCRIPTED

    def factory(self, *steps: ScriptedStep, script: Iterable[ScriptedStep] = (), **keywords: Any) -> InterpreterFactory:
        made = self.made

        class Noted(SandboxInterpreter):
            def __init__(self, *args: Any, **keywords: Any) -> None:
                super().__init__(*args, **keywords)
                made.append(self)  # before DSPy 3.3, RLM leaves it to its user to shut an interpreter down

        provider = self.provider or ScriptedBroker(steps or script)
        return Noted.factory(provider=provider, **{"execution_timeout_s": 60.0, **keywords})

    def make(self, *steps: ScriptedStep, **keywords: Any) -> SandboxInterpreter:
        return self.factory(*steps, **keywords)()

    def close(self) -> None:
        for interpreter in self.made:
            interpreter.shutdown()


@dataclasses.dataclass
class _Running:
    host_socket: Path
    ended: bool = False


@contextlib.contextmanager
def in_process() -> Iterator[SandboxProvider]:
    with InProcessBroker() as broker:
        yield FakeProvider(broker)


def _image() -> str:
    from host_client.image import ensure_image

    try:
        return ensure_image(SandboxSettings(), print)
    except EngineUnavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no engine: {error.message}")


@contextlib.contextmanager
def one_container() -> Iterator[SandboxProvider]:
    """One container for all tests: each interpreter gets a session of its own in it."""
    from host_client.providers.docker import DockerProvider

    docker = DockerProvider()
    handle = docker.start(SandboxSettings(image=_image()))
    try:
        yield FakeProvider(_Running(handle.socket_path))
    finally:
        docker.stop(handle)


@contextlib.contextmanager
def one_sandbox_without_an_engine() -> Iterator[SandboxProvider]:
    """The same, made of namespaces."""
    from host_client.providers.bubblewrap import BubblewrapProvider
    from tests.bubblewrap.sandboxes import make_ready

    make_ready()
    bubblewrap = BubblewrapProvider()
    handle = bubblewrap.start(SandboxSettings())
    try:
        yield FakeProvider(_Running(handle.socket_path))
    finally:
        bubblewrap.stop(handle)


class _ThroughARelay(FakeProvider):
    """One container whose socket is not shared."""

    def __init__(self, docker: DockerProvider, handle: SandboxHandle) -> None:
        super().__init__(_Running(handle.socket_path))
        self._docker, self._handle_of_it = docker, handle

    def transport(self, handle: SandboxHandle) -> Transport:
        return self._docker.transport(self._handle_of_it)


@contextlib.contextmanager
def one_container_through_a_relay() -> Iterator[SandboxProvider]:
    from host_client.providers.docker import DockerProvider

    docker = DockerProvider()
    handle = docker.start(SandboxSettings(image=_image(), transport="exec"))
    held = docker.transport(handle)  # so that its relay stays from one test to the next
    try:
        yield _ThroughARelay(docker, handle)
    finally:
        held.close()
        docker.stop(handle)


PROVIDERS: dict[str, Callable[[], contextlib.AbstractContextManager[SandboxProvider]]] = {
    IN_PROCESS: in_process,
    DOCKER: one_container,
    RELAY: one_container_through_a_relay,
    BUBBLEWRAP: one_sandbox_without_an_engine,
}
BACKENDS = [SCRIPTED, IN_PROCESS, pytest.param(DOCKER, marks=pytest.mark.docker)]
# What is below the broker is not DSPy's affair: the newest DSPy alone meets it.
_WITHOUT_ENGINE = [pytest.param(BUBBLEWRAP, marks=pytest.mark.docker)] if HAS_FLEX else []
REAL_BACKENDS = [*BACKENDS[1:], *_WITHOUT_ENGINE]
_RELAYED = [pytest.param(RELAY, marks=pytest.mark.docker)] if HAS_FLEX else []
CORE_BACKENDS = [*BACKENDS, *_RELAYED, *_WITHOUT_ENGINE]
