"""A factory keeps fresh sandboxes ready: whose, since when, and when none."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from host_client import SandboxInterpreter, SandboxSettings, ScriptedBroker, wait_for_endings
from host_client.errors import BadSetting, EngineUnavailable
from host_client.pool_registry import of_this_process
from tests.host_client.pool_fixtures import SETTINGS, WAIT_S, Sandboxes, nothing_left, sandboxes

__all__ = ["nothing_left", "sandboxes"]


def own_sandbox(interpreter: SandboxInterpreter) -> str:
    assert interpreter.sandbox_handle is not None
    return interpreter.sandbox_handle.sandbox_id


def test_making_a_factory_starts_nothing_and_its_first_call_begins(sandboxes: Sandboxes) -> None:
    sandboxes.may_start.clear()
    factory = SandboxInterpreter.factory(settings=SETTINGS, provider=sandboxes)
    assert factory._own_pool is None
    interpreter = factory()
    assert factory._own_pool is not None
    assert factory._own_pool.status().states["starting"] == 1
    sandboxes.may_start.set()
    with interpreter:
        assert interpreter.execute("1") == 1
        assert own_sandbox(interpreter) == "scripted-1", "the one that was starting"


def test_the_next_interpreters_take_what_is_ready(sandboxes: Sandboxes) -> None:
    factory = SandboxInterpreter.factory(settings=SETTINGS, provider=sandboxes)
    for _ in range(3):
        assert factory.prewarm(wait=True)
        assert factory._own_pool is not None
        before = factory._own_pool.status().counts.get("at once", 0)
        with factory() as interpreter:
            assert interpreter.execute("1") == 1
        assert factory._own_pool.status().counts["at once"] == before + 1


def test_more_at_once_than_are_ready_start_their_own(sandboxes: Sandboxes) -> None:
    factory = SandboxInterpreter.factory(settings=SETTINGS, provider=sandboxes)
    interpreters = [factory() for _ in range(5)]
    for interpreter in interpreters:
        interpreter.start()
    assert len({own_sandbox(interpreter) for interpreter in interpreters}) == 5
    for interpreter in interpreters:
        interpreter.shutdown()


def test_factories_with_equal_settings_share_what_is_ready(
    sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("factory", "pool"):
        monkeypatch.setattr(f"host_client.{module}.default_provider", lambda settings: sandboxes)
    one, two = (SandboxInterpreter.factory(settings=SETTINGS) for _ in range(2))
    other = SandboxInterpreter.factory(settings=SandboxSettings(journal=":memory:", memory="2g"))
    secret = SandboxInterpreter.factory(settings=SETTINGS, secrets={"TOKEN": "not for the others"})
    pools = [factory()._pool for factory in (one, two, other, secret)]
    assert pools[0] is pools[1]
    assert len({id(pool) for pool in pools}) == 3
    for pool in pools:
        assert pool is not None
        pool.close()


@pytest.mark.parametrize(
    "keywords",
    [
        {"sandbox": "scripted"},
        {"session": "named"},
        {"attach": "named"},
        {"settings": SandboxSettings(journal=":memory:", warm_pool_size=0)},
    ],
)
def test_none_is_kept_for_what_is_not_like_all_others(sandboxes: Sandboxes, keywords: dict[str, Any]) -> None:
    factory = SandboxInterpreter.factory(**{"settings": SETTINGS, **keywords}, provider=sandboxes)
    factory()
    assert not factory.prewarm()
    assert factory._own_pool is None


def test_none_is_kept_where_a_start_costs_nothing() -> None:
    broker = ScriptedBroker()
    factory = SandboxInterpreter.factory(settings=SETTINGS, provider=broker)
    factory()
    assert not factory.prewarm(wait=True)
    assert broker.started == 0


def test_what_is_ready_ends_with_a_factory_that_nobody_refers_to(sandboxes: Sandboxes) -> None:
    factory = SandboxInterpreter.factory(settings=SETTINGS, provider=sandboxes)
    assert factory.prewarm(wait=True)
    assert len(sandboxes.living) == 1
    del factory
    gc.collect()
    assert wait_for_endings(WAIT_S)
    assert sandboxes.living == {}


def test_an_interpreter_outlives_its_factory(sandboxes: Sandboxes) -> None:
    interpreter = SandboxInterpreter.factory(settings=SETTINGS, provider=sandboxes)()
    gc.collect()
    with interpreter:
        assert interpreter.execute("1") == 1


def test_what_cannot_start_is_told_to_who_uses_it(sandboxes: Sandboxes) -> None:
    sandboxes.failures = [EngineUnavailable("no engine")] * 3
    factory = SandboxInterpreter.factory(settings=SETTINGS, provider=sandboxes)
    interpreter = factory()
    with pytest.raises(EngineUnavailable, match="no engine"):
        interpreter.start()


def test_the_setting_comes_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SandboxSettings().warm_pool_size == 1
    monkeypatch.setenv("RLM_SANDBOX_WARM_POOL_SIZE", "3")
    assert SandboxSettings.from_environment().warm_pool_size == 3
    with pytest.raises(BadSetting, match="warm_pool_size=-1"):
        SandboxSettings(warm_pool_size=-1)


def test_the_exit_closes_what_factories_share(sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("factory", "pool"):
        monkeypatch.setattr(f"host_client.{module}.default_provider", lambda settings: sandboxes)
    factory = SandboxInterpreter.factory(settings=SETTINGS)
    assert factory.prewarm(wait=True)
    of_this_process().close_all()
    assert sandboxes.living == {}
    pool = factory()._pool
    assert pool is not None
    pool.close()
