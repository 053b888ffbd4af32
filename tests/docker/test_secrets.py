"""Secrets in a real container: generated code has them, and nothing else on this machine shows them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_client import SandboxInterpreter, SandboxSettings, secrets_check
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.runtime_dir import RuntimeDir
from tests.docker.sandboxes import engine, image, leaks, provider, runtime, settings

pytestmark = pytest.mark.docker

__all__ = ["engine", "image", "provider", "runtime", "settings"]

SECRET = "tr0ub4dor-in-the-attic"


@pytest.fixture
def interpreter(settings: SandboxSettings, provider: DockerProvider) -> Iterator[SandboxInterpreter]:
    with SandboxInterpreter(secrets={"API_KEY": SECRET}, settings=settings, provider=provider) as made:
        yield made


def test_code_has_it_and_container_logs_and_processes_do_not(
    interpreter: SandboxInterpreter, engine: DockerEngine
) -> None:
    assert interpreter.execute("import os\nlen(os.environ['API_KEY'])") == len(SECRET)
    assert interpreter.execute("os.environ['API_KEY']") == "[secret API_KEY]"
    assert interpreter.sandbox_handle is not None
    sandbox_id = interpreter.sandbox_handle.sandbox_id
    described = engine.inspect(sandbox_id)
    assert SECRET not in json.dumps(described)
    assert SECRET not in engine.logs(sandbox_id, 10_000)
    if os.geteuid() == 0:  # others may not look
        processes = _processes_of(int(described["State"]["Pid"]))
        assert len(processes) >= 3, "supervisor, broker, worker"
        for process in processes:
            assert SECRET.encode() not in (process / "environ").read_bytes() + (process / "cmdline").read_bytes()


def _processes_of(first: int) -> list[Path]:
    """Processes in the same container, by their pid namespace."""
    namespace = os.readlink(f"/proc/{first}/ns/pid")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns/pid") == namespace:
                found.append(process)
        except OSError:  # it has ended
            continue
    return found


def test_sessions_of_a_named_sandbox_do_not_share_it(
    settings: SandboxSettings, provider: DockerProvider, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    handle = provider.start(settings, name="secrets-test")
    try:
        has = SandboxInterpreter(
            sandbox="secrets-test", secrets={"API_KEY": SECRET}, settings=settings, provider=provider
        )
        has_not = SandboxInterpreter(sandbox="secrets-test", settings=settings, provider=provider)
        with has, has_not:
            worker = has.execute("import os\nos.getpid()")
            assert has.execute("'API_KEY' in os.environ") is True
            look = f"""
import os
def read(name):
    try:
        return open(f"/proc/{worker}/{{name}}", "rb").read(1 << 16)
    except OSError as error:
        return type(error).__name__
['API_KEY' in os.environ, read("environ"), read("mem"), os.path.exists("/proc/{worker}")]
"""
            assert has_not.execute(look) == [False, "PermissionError", "PermissionError", True]
    finally:
        provider.stop(handle)
    assert leaks(engine, runtime) == []


def test_the_check_starts_a_sandbox_and_leaves_nothing(
    settings: SandboxSettings,
    provider: DockerProvider,
    engine: DockerEngine,
    runtime: RuntimeDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("API_KEY", SECRET)
    said: list[str] = []
    assert secrets_check.run(["API_KEY"], settings, say=said.append, provider=provider) == 0
    assert said[0].split() == ["API_KEY", "set", "in", "the", "sandbox:", "present"]
    assert SECRET not in str(said)
    assert leaks(engine, runtime) == []
