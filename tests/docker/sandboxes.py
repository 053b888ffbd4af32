"""What the Docker tests share: a real provider in a runtime directory of the test's own, and looking for leaks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_client.endings import wait_for_endings
from host_client.engine import connect_engine
from host_client.errors import EngineUnavailable
from host_client.image import ensure_image
from host_client.providers.container_spec import LABEL, LABEL_DIRECTORY
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings

ROOT = Path(__file__).resolve().parents[2]
#: What is let go ends in the background, within a fraction of a second where the machine is quiet.
ENDINGS_S = 60.0


@pytest.fixture(scope="session")
def image() -> str:
    """The image of these sources, built if it is not there."""
    try:
        return ensure_image(SandboxSettings(), print)
    except EngineUnavailable as error:
        pytest.skip(f"no engine: {error.message}")


@pytest.fixture
def settings(image: str) -> SandboxSettings:
    return SandboxSettings(image=image)


@pytest.fixture
def engine() -> Iterator[DockerEngine]:
    with connect_engine() as connected:
        yield connected


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, engine: DockerEngine) -> Iterator[RuntimeDir]:
    """A runtime directory of the test's own; whatever a failed test left there is removed."""
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setenv("RLM_SANDBOX_RUNTIME_DIR", f"{path}/r")
        yield RuntimeDir.open()
        assert wait_for_endings(ENDINGS_S)
        for container in containers(engine, Path(path)):
            engine.remove(container)


@pytest.fixture
def provider(runtime: RuntimeDir) -> Iterator[DockerProvider]:
    made = DockerProvider()
    yield made
    made.stop_all_owned()


def containers(engine: DockerEngine, below: Path) -> list[str]:
    """Ids of the containers whose sockets are below a directory."""
    listed = engine.list({LABEL: "1"})
    return [there["Id"] for there in listed if Path(there["Labels"][LABEL_DIRECTORY]).is_relative_to(below)]


def leaks(engine: DockerEngine, runtime: RuntimeDir) -> list[str]:
    """What is left of sandboxes, once those that were let go have ended: containers, directories, reservations."""
    assert wait_for_endings(ENDINGS_S)
    directories = [path.name for path in runtime.path.iterdir() if path.name not in ("lock", "uids")]
    reservations = [f"uids/{path.name}" for path in (runtime.path / "uids").iterdir()]
    return containers(engine, runtime.path) + directories + reservations


def run_host(code: str, image: str) -> subprocess.Popen[str]:
    """Start a host process that runs this code after making ``provider`` and ``settings``."""
    prelude = (
        "import os, signal, sys\n"
        "from host_client.providers.docker import DockerProvider\n"
        "from host_client.settings import SandboxSettings\n"
        f"provider, settings = DockerProvider(), SandboxSettings(image={image!r})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
