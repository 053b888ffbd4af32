"""What tests of the provider share: a runtime directory short enough for sockets, and an engine in memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_client import runtime_dir
from host_client.owner import Owner
from host_client.providers.docker import DockerProvider
from host_client.providers.fake_engine import FakeEngine
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings

SETTINGS = SandboxSettings(image="fake:1", start_timeout_s=5.0)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[RuntimeDir]:
    # The fake's brokers run in this process, so a directory of root's must stay root's.
    monkeypatch.setattr(runtime_dir, "BROKER_UID_FOR_ROOT", 0)
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setenv("RLM_SANDBOX_RUNTIME_DIR", f"{path}/r")
        yield RuntimeDir.open()


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    fake = FakeEngine()
    yield fake
    for container in list(fake.containers.values()):
        container.end(0)


@pytest.fixture
def provider(runtime: RuntimeDir, engine: FakeEngine) -> Iterator[DockerProvider]:
    made = make_provider(engine)
    yield made
    made.stop_all_owned()


def make_provider(engine: FakeEngine) -> DockerProvider:
    return DockerProvider(connect=engine.connect, image_of=lambda settings: settings.image or "")


def dead_owner() -> Owner:
    """An owner that really lived in this boot and is gone."""
    child = subprocess.run(
        [sys.executable, "-c", "from host_client.owner import Owner; print(Owner.current().label())"],
        check=True,
        capture_output=True,
        text=True,
    )
    owner = Owner.parse(child.stdout.strip())
    assert owner is not None
    return owner


def left_over(runtime: RuntimeDir) -> list[Path]:
    """What of sandboxes is still in the runtime directory."""
    directories = [path for path in runtime.path.iterdir() if path.name not in ("lock", "uids")]
    return directories + list((runtime.path / "uids").iterdir())
