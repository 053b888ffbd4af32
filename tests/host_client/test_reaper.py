"""The reaper takes what killed processes left, and nothing else."""

from __future__ import annotations

import os

import pytest

from host_client.errors import ProviderError
from host_client.owner import Owner
from host_client.providers.container_spec import ContainerSpec
from host_client.providers.docker import DockerProvider
from host_client.providers.fake_engine import FakeEngine
from host_client.providers.isolation import Isolation
from host_client.reaper import reap
from host_client.runtime_dir import RuntimeDir
from tests.host_client.provider_fixtures import (
    SETTINGS,
    dead_owner,
    engine,
    left_over,
    make_provider,
    provider,
    runtime,
)

__all__ = ["engine", "provider", "runtime"]


def leave_behind(engine: FakeEngine, runtime: RuntimeDir, owner: Owner, *, name: str, owned: bool) -> str:
    """Make what a process leaves behind that was killed after starting a sandbox; return the container's id."""
    directory = runtime.create(owner)
    spec = ContainerSpec(
        settings=SETTINGS,
        image="fake:1",
        name=name,
        owned=owned,
        owner=owner.label(),
        directory=directory.path,
        guest_uid_base=directory.guest_uid_base,
        broker_uid=1,
        created="2026-01-01T00:00:00+00:00",
        isolation=Isolation(),
    )
    container_id = engine.create_container(**spec.keywords())
    engine.start(container_id)
    return container_id


def test_the_sandbox_of_a_killed_process_is_removed_with_all_it_holds(engine: FakeEngine, runtime: RuntimeDir) -> None:
    orphan = leave_behind(engine, runtime, dead_owner(), name="abc", owned=True)
    assert reap(engine, runtime) == [orphan]
    assert engine.containers == {}
    assert left_over(runtime) == []


def test_a_directory_whose_container_never_came_to_be_is_removed(engine: FakeEngine, runtime: RuntimeDir) -> None:
    runtime.create(dead_owner())
    reap(engine, runtime)
    assert left_over(runtime) == []


def test_living_siblings_are_spared(engine: FakeEngine, runtime: RuntimeDir, provider: DockerProvider) -> None:
    handle = provider.start(SETTINGS)
    assert reap(engine, runtime) == []
    assert handle.socket_path.is_socket()
    assert handle.sandbox_id in engine.containers


def test_named_sandboxes_are_spared_although_their_starter_is_gone(engine: FakeEngine, runtime: RuntimeDir) -> None:
    named = leave_behind(engine, runtime, dead_owner(), name="default", owned=False)
    assert reap(engine, runtime) == []
    assert engine.containers[named].socket_path.is_socket()
    assert len(left_over(runtime)) == 2, "its directory and its reservation"


def test_other_users_sandboxes_are_spared(
    engine: FakeEngine, runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = leave_behind(engine, runtime, dead_owner(), name="abc", owned=True)
    mine = os.geteuid()
    engine.containers[theirs].keywords["labels"]["rlm-sandbox.host-uid"] = str(mine + 1)
    assert reap(engine, runtime) == []
    assert theirs in engine.containers


def test_containers_of_others_that_carry_strange_labels_are_spared(engine: FakeEngine, runtime: RuntimeDir) -> None:
    strange = leave_behind(engine, runtime, dead_owner(), name="abc", owned=True)
    engine.containers[strange].keywords["labels"]["rlm-sandbox.owner"] = "somebody"
    assert reap(engine, runtime) == []


def test_a_container_that_cannot_be_removed_keeps_its_directory_and_does_not_stop_the_start(
    engine: FakeEngine, runtime: RuntimeDir, provider: DockerProvider
) -> None:
    orphan = leave_behind(engine, runtime, dead_owner(), name="abc", owned=True)
    engine.failures["remove"] = [ProviderError("device or resource busy")]
    handle = provider.start(SETTINGS)
    assert orphan in engine.containers
    assert len(left_over(runtime)) == 4
    provider.stop(handle)
    assert reap(engine, runtime) == [orphan]
    assert left_over(runtime) == []


def test_it_runs_once_for_each_process(engine: FakeEngine, runtime: RuntimeDir) -> None:
    provider = make_provider(engine)
    provider.stop(provider.start(SETTINGS))
    orphan = leave_behind(engine, runtime, dead_owner(), name="abc", owned=True)
    provider.stop(provider.start(SETTINGS))
    assert orphan in engine.containers
    again = make_provider(engine)
    again.stop(again.start(SETTINGS))
    assert engine.containers == {}


def test_an_orphan_in_an_earlier_runtime_directory_is_cleared_too(
    engine: FakeEngine, runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_behind(engine, runtime, dead_owner(), name="abc", owned=True)
    other = RuntimeDir(runtime.path.parent / "s")
    reap(engine, other)
    assert left_over(runtime) == []
