"""``pool.factory(session=...)``: all its interpreters belong to one session, with what the pool's affinity says."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from typing import Any

import dspy
import pytest

from broker.testing import InProcessBroker
from host_client import SandboxInterpreter, SandboxPool
from host_client.errors import BadSetting, PoolExhausted, PoolSessionBusy, PoolSessionGone, PoolWaitTimeout
from host_client.providers.fake import FakeProvider
from host_client.scripted_steps import Step
from tests.conformance.dspy_versions import HAS_FACTORY, rlm, writes
from tests.host_client.pool_fixtures import SETTINGS, WAIT_S, Sandboxes, make, nothing_left, sandboxes

__all__ = ["nothing_left", "sandboxes"]

STRICT = ["strict_queue", "strict_fail_fast"]


def own_sandbox(interpreter: SandboxInterpreter) -> str:
    assert interpreter.sandbox_handle is not None
    return interpreter.sandbox_handle.sandbox_id


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as box:
        yield box


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_rlm_of_a_session_finds_its_variables_again(broker: InProcessBroker) -> None:
    with SandboxPool(name="rlm", affinity="strict_queue", settings=SETTINGS, provider=FakeProvider(broker)) as pool:
        program = rlm("n -> answer", pool.factory(session="case-7"))
        count = "seen = globals().get('seen', []) + [n]\nSUBMIT(','.join(seen))"
        answers = []
        for n in "abc":
            with dspy.context(lm=writes(count)):
                answers.append(program(n=n).answer)
        assert answers == ["a", "a,b", "a,b,c"]
        if not HAS_FACTORY:
            program._interpreter.shutdown()
        with pool.interpreter(session="case-7") as same, pool.factory(session="case-8")() as another:
            assert same.execute("seen") == ["a", "b", "c"]
            assert another.execute("'seen' in globals()") is False


@pytest.mark.parametrize("affinity", ["hint", *STRICT])
def test_one_after_the_other_gets_the_same_sandbox(sandboxes: Sandboxes, affinity: str) -> None:
    factory = make(sandboxes, affinity=affinity).factory(session="a")
    with factory() as one:
        first = own_sandbox(one)
    with factory() as other:
        assert own_sandbox(other) == first


def test_two_at_once_with_a_hint_are_apart_and_the_first_one_stays_the_sessions(sandboxes: Sandboxes) -> None:
    factory = make(sandboxes, affinity="hint").factory(session="a")
    with factory() as one:
        first = own_sandbox(one)
        with factory() as beside:
            assert own_sandbox(beside) != first
    with factory() as again:
        assert own_sandbox(again) == first


def test_two_at_once_fail_fast(sandboxes: Sandboxes) -> None:
    factory = make(sandboxes, affinity="strict_fail_fast").factory(session="a")
    with factory(), pytest.raises(PoolSessionBusy, match="session 'a' is in use by thread MainThread"):
        factory().start()


def test_two_at_once_wait_in_the_queue_for_each_other(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, affinity="strict_queue")
    factory = pool.factory(session="a")
    got: list[str] = []

    def use() -> None:
        with factory() as interpreter:
            got.append(own_sandbox(interpreter))

    with factory() as one:
        thread = threading.Thread(target=use)
        thread.start()
        core = pool._core()
        with core._changed:
            assert core._changed.wait_for(lambda: bool(core._book.waiting), WAIT_S)
        got.append(own_sandbox(one))
    thread.join(WAIT_S)
    assert len(got) == 2
    assert got[0] == got[1]


def test_waiting_for_the_session_has_an_end(sandboxes: Sandboxes) -> None:
    factory = make(sandboxes, affinity="strict_queue", wait_timeout_s=0.05).factory(session="a")
    with factory(), pytest.raises(PoolSessionBusy, match=r"waited 0\.05 s for the sandbox of session 'a'"):
        factory().start()


@pytest.mark.parametrize("affinity", ["hint", *STRICT])
def test_nested_use_of_one_factory_never_waits_for_itself(affinity: str) -> None:
    raised: list[str] = []

    def again() -> str:
        try:
            with factory() as inner:
                return f"{own_sandbox(inner)}"
        except PoolSessionBusy as error:
            raised.append(str(error))
            return "refused"

    own = Sandboxes([lambda execution: Step(value=execution.call("again")), Step(value="inner")])
    pool = make(own, affinity=affinity)
    factory = pool.factory(session="a", tools={"again": again})
    with factory() as outer:
        answer = outer.execute("again()")
        assert answer == "refused" if affinity != "hint" else answer not in ("refused", own_sandbox(outer))
    pool.close()
    assert len(raised) == (affinity != "hint")
    if affinity == "strict_queue":
        assert "around this call" in raised[0]


def test_a_full_pool_refuses_the_session_too(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, max_size=1, exhaustion="fail_fast", affinity="strict_queue")
    with pool.interpreter(session="b"), pytest.raises(PoolExhausted) as full:
        pool.factory(session="a")().start()
    assert full.value.session == "a"


def test_a_full_pool_lets_the_session_wait_for_as_long_as_it_says(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, max_size=1, wait_timeout_s=0.05, affinity="strict_queue")
    with pool.interpreter(session="b"), pytest.raises(PoolWaitTimeout, match=r"session 'b'"):
        pool.factory(session="a")().start()


@pytest.mark.parametrize("affinity", STRICT)
def test_a_session_whose_sandbox_died_is_gone_until_it_is_ended(sandboxes: Sandboxes, affinity: str) -> None:
    pool = make(sandboxes, affinity=affinity)
    factory = pool.factory(session="a")
    with factory() as one:
        sandboxes.lose(one.sandbox_handle)
    for _ in range(2):
        with pytest.raises(PoolSessionGone, match="session 'a' is gone"):
            factory().start()
    assert pool.end_session("a")
    with factory() as anew:
        assert anew.execute("1") == 1


def test_with_a_hint_it_starts_anew_without_a_word(sandboxes: Sandboxes) -> None:
    factory = make(sandboxes, affinity="hint").factory(session="a")
    with factory() as one:
        first = own_sandbox(one)
        sandboxes.lose(one.sandbox_handle)
    with factory() as anew:
        assert own_sandbox(anew) != first


def test_it_survives_a_copy_and_a_pickle(sandboxes: Sandboxes) -> None:
    factory = make(sandboxes, name="triage").factory(session="a")
    with factory() as one:
        first = own_sandbox(one)
    with pickle.loads(pickle.dumps(factory))() as other:
        assert own_sandbox(other) == first


@pytest.mark.parametrize("session", ["", "two words", 3, "a" * 65])
def test_a_name_that_cannot_be_is_refused_when_the_factory_is_made(sandboxes: Sandboxes, session: Any) -> None:
    with pytest.raises(BadSetting, match="session"):
        make(sandboxes).factory(session=session)


def test_a_session_is_not_for_a_whole_pool(sandboxes: Sandboxes) -> None:
    with pytest.raises(BadSetting, match=r"pool\.factory\(session="):
        make(sandboxes, session="a")
