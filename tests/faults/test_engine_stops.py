"""The engine stops and starts: on a second one of the test's own, so that nobody else's containers are touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_client import SandboxInterpreter, SandboxSettings
from host_client.errors import SandboxError, SessionLost
from host_client.providers.docker import DockerProvider
from tests.docker.sandboxes import image
from tests.faults.seams import count, counting

__all__ = ["image"]

pytestmark = [pytest.mark.docker, pytest.mark.skipif(os.geteuid() != 0, reason="an engine of its own needs root")]

_START_S = 60.0


class OwnEngine:
    """A dockerd with folders, socket and containerd of its own, without a network."""

    def __init__(self, folder: Path) -> None:
        self.url = f"unix://{folder}/docker.sock"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and return once it answers."""
        folder = self._folder
        self._process = subprocess.Popen(
            [
                # A network namespace of its own: without a bridge, dockerd would remove the machine's docker0.
                *("unshare", "--net"),
                "dockerd",
                *(f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"),
                *(f"--host={self.url}", "--iptables=false", "--bridge=none"),
            ],
            stdout=(folder / "log").open("ab"),
            stderr=subprocess.STDOUT,
        )
        subprocess.run(
            ["timeout", str(_START_S), "sh", "-c", f"until docker -H {self.url} version; do :; done"],
            check=True,
            capture_output=True,
        )

    def stop(self) -> None:
        """Stop it; its containers end with it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_START_S)
            self._process = None


@pytest.fixture
def own_engine(image: str) -> Iterator[OwnEngine]:
    """An engine with the image; not below pytest's folders, whose paths are too long for a socket's."""
    if shutil.which("dockerd") is None:
        pytest.skip("no dockerd on this machine")
    folder = Path(f"/var/tmp/rlm-own-engine-{os.getpid()}")
    folder.mkdir(mode=0o700)
    made = OwnEngine(folder)
    try:
        made.start()
        saved = subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE)
        subprocess.run(["docker", "-H", made.url, "load"], stdin=saved.stdout, check=True, capture_output=True)
        saved.wait()
        yield made
    finally:
        made.stop()
        subprocess.run(["umount", str(folder / "data")], capture_output=True)  # it mounts this folder on itself
        shutil.rmtree(folder, ignore_errors=True)


def test_an_engine_that_stops_mid_tool_costs_the_session_and_a_new_one_works_when_it_is_back(
    own_engine: OwnEngine, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", own_engine.url)
    monkeypatch.setenv("RLM_SANDBOX_RUNTIME_DIR", f"/var/tmp/rlm-own-engine-{os.getpid()}/r")
    counter = tmp_path / "counter"
    work, stopped = counting(counter), threading.Event()

    def effect(text: str) -> str:
        answer = work(text)
        own_engine.stop()
        stopped.set()
        return answer

    provider = DockerProvider()
    settings = SandboxSettings(image=image)
    interpreter = SandboxInterpreter(tools={"effect": effect}, settings=settings, provider=provider)
    with pytest.raises(SessionLost) as lost:
        interpreter.execute("import time\neffect('once')\ntime.sleep(600)")
    # The engine asks containers to stop before it kills them: a broker that has the time says so itself.
    assert lost.value.reason in {"engine_gone", "killed", "shutdown"}
    assert count(counter) == 1
    assert stopped.wait(_START_S)
    with pytest.raises(SandboxError):
        SandboxInterpreter(settings=settings, provider=provider).start()
    own_engine.start()
    with SandboxInterpreter(settings=settings, provider=provider) as another:
        assert another.execute("6 * 7") == 42
    provider.stop_all_owned()  # what the engine kept of the first one
