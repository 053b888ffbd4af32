"""Forks in real containers: who ends the container, who can go on after whose death, and that nothing is left."""

from __future__ import annotations

import signal

import pytest

from host_client import SandboxInterpreter, SandboxPool
from host_client.errors import SandboxError, SessionLost
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from tests.docker.sandboxes import engine, image, leaks, provider, run_host, runtime, settings

pytestmark = pytest.mark.docker

__all__ = ["engine", "image", "provider", "runtime", "settings"]


def test_a_container_lives_as_long_as_one_of_the_branches_does(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    parent = SandboxInterpreter({"shout": str.upper}, provider=provider, settings=settings)
    parent.execute("x = [1]")
    snapshot = parent.snapshot()
    left, right = parent.fork(2)
    parent.execute("x.append(2)")
    parent.rollback(snapshot)
    assert parent.execute("x") == [1]
    assert snapshot.not_kept == ()
    parent.shutdown(wait=True)
    assert left.execute("x.append(3); [x, shout('a')]") == [[1, 3], "A"]
    with pytest.raises(SessionLost, match="SIGSEGV"):
        left.execute("import os; os.kill(os.getpid(), 11)")
    assert right.execute("x") == [1]
    [leaf] = right.fork()
    right.shutdown(wait=True)
    assert leaf.execute("x") == [1]
    leaf.shutdown(wait=True)
    assert leaks(engine, runtime) == []


def test_branches_of_a_named_sandbox_and_of_a_pool(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    handle = provider.start(settings, name="forking")
    with SandboxInterpreter(sandbox="forking", provider=provider, settings=settings) as session:
        session.execute("x = 1")
        [branch] = session.fork()
    assert branch.execute("x") == 1
    branch.shutdown()
    with SandboxInterpreter(sandbox="forking", provider=provider, settings=settings) as fresh:
        assert fresh.execute("'x' in globals()") is False
    provider.stop(handle)
    with SandboxPool(name="forking", min_size=1, max_size=1, provider=provider, settings=settings) as pool:
        with pool.interpreter() as session:
            session.execute("x = 1")
            [branch] = session.fork()
        with pool.interpreter() as other:  # the place is free, and what is in it is new
            assert other.execute("'x' in globals()") is False
        assert branch.execute("x") == 1
        branch.shutdown()
    assert leaks(engine, runtime) == []


HOST = """
from host_client import SandboxInterpreter
parent = SandboxInterpreter(provider=provider, settings=settings)
parent.execute("x = 41")
branches = parent.fork(2)
for branch in branches:
    branch.execute("x += 1")
print(*(branch.session_id for branch in branches), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_others_go_on_with_the_branches_of_a_host_that_was_killed(
    image: str, provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    host = run_host(HOST, image)
    printed, errors = host.communicate(timeout=60)
    assert host.returncode == -signal.SIGKILL, errors
    ids = printed.split()
    first, second = (SandboxInterpreter.attach(each, provider=provider, settings=settings) for each in ids)
    assert first.execute("x") == 42
    assert first.sandbox_handle is not None
    handle = first.sandbox_handle
    first.shutdown(wait=True)  # not the container: somebody goes on with another branch of it
    assert second.execute("x") == 42
    second.shutdown(wait=True)
    provider.stop(handle)  # the third branch was nobody's; the container would end a minute after its last host
    assert leaks(engine, runtime) == []


def test_the_brokers_death_ends_every_branch_and_snapshot_with_its_reason(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    parent = SandboxInterpreter(provider=provider, settings=settings)
    parent.execute("x = 1")
    snapshot = parent.snapshot()
    [branch] = parent.fork()
    assert parent.sandbox_handle is not None
    engine.kill(parent.sandbox_handle.sandbox_id)
    for each in (parent, branch):
        with pytest.raises(SessionLost):
            each.execute("x")
    with pytest.raises(SandboxError):
        parent.rollback(snapshot)
    snapshot.drop()
    for each in (parent, branch):
        each.shutdown(wait=True)
    assert leaks(engine, runtime) == []
