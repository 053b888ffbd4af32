"""Pools as their users see them: threads, time-outs, errors that name who holds what, and no sandbox left."""

from __future__ import annotations

import gc
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import host_client
from host_client import SandboxInterpreter, SandboxPool, SandboxSettings, get_pool, wait_for_endings
from host_client.dspy_compat import holding, holding_also
from host_client.errors import (
    BadSetting,
    EngineUnavailable,
    PoolClosed,
    PoolExhausted,
    PoolQueueFull,
    PoolSessionBusy,
    PoolSessionGone,
    PoolWaitTimeout,
    SessionLost,
    UnknownPool,
)
from host_client.memory_journal import MemoryJournal
from host_client.scripted_steps import Step
from tests.host_client.pool_fixtures import SETTINGS, WAIT_S, Sandboxes, make, nothing_left, sandboxes

__all__ = ["nothing_left", "sandboxes"]


def own_sandbox(interpreter: SandboxInterpreter) -> str:
    assert interpreter.sandbox_handle is not None
    return interpreter.sandbox_handle.sandbox_id


# Warm


def test_a_warm_sandbox_is_taken_and_goes_to_nobody_else(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, min_size=1)
    assert pool.prewarm(wait=True)
    sandboxes.may_start.clear()  # from here on there is only what was warm
    with pool.interpreter() as interpreter:
        first = own_sandbox(interpreter)
        assert interpreter.execute("1") == 1
    sandboxes.may_start.set()
    with pool.interpreter() as interpreter:
        assert own_sandbox(interpreter) != first


def test_a_warm_sandbox_that_died_is_never_handed_out(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, min_size=2)
    assert pool.prewarm(wait=True)
    [dead, living] = list(sandboxes.living.values())
    sandboxes.lose(dead)
    with pool.interpreter() as interpreter:
        assert own_sandbox(interpreter) == living.sandbox_id
        assert interpreter.execute("1") == 1
    assert pool.status().counts["ended: died"] == 1


def test_one_that_dies_while_nobody_asks_is_replaced(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, min_size=1, health_interval_s=0.01)
    assert pool.prewarm(wait=True)
    [dead] = sandboxes.living.values()
    sandboxes.lose(dead)
    core = pool._core()
    with core._changed:
        assert core._changed.wait_for(lambda: pool_counts(core).get("ended: died", 0) >= 1, WAIT_S)
    assert pool.prewarm(wait=True)
    with pool.interpreter() as interpreter:
        assert own_sandbox(interpreter) != dead.sandbox_id


def pool_counts(core: Any) -> dict[str, int]:
    return dict(core._book.counts)


def started(pool: SandboxPool, session: str | None = None) -> SandboxInterpreter:
    interpreter = pool.interpreter(session=session)
    interpreter.start()
    return interpreter


def test_why_no_sandbox_could_be_started_is_told_to_who_waits_for_it(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes)
    sandboxes.failures = [EngineUnavailable("no engine")]
    with pytest.raises(EngineUnavailable, match="no engine"):
        pool.interpreter().start()
    with pool.interpreter() as interpreter:
        assert interpreter.execute("1") == 1


def test_why_none_could_be_started_ahead_is_told_to_who_waits_for_that(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, min_size=1, prewarm=False)
    sandboxes.failures = [EngineUnavailable("no engine")]
    with pytest.raises(EngineUnavailable, match="no engine"):
        pool.prewarm(wait=True)
    assert pool.prewarm(wait=True)


def test_secrets_are_sent_when_the_sandbox_is_taken(sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SandboxSettings(journal=":memory:", secrets=["POOL_TOKEN"])
    monkeypatch.setenv("POOL_TOKEN", "the value of before")
    pool = make(sandboxes, min_size=1, settings=settings)
    assert pool.prewarm(wait=True)
    [client] = sandboxes._clients.values()
    assert client.sessions() == [], "no session, so no secret, in a sandbox that waits"
    monkeypatch.setenv("POOL_TOKEN", "the value of now")
    with pool.interpreter() as interpreter:
        [session] = client.sessions()
        assert session.secrets == ("POOL_TOKEN",)
        assert interpreter._session is not None
        assert interpreter._session.masker.text("the value of now") == "[secret POOL_TOKEN]"


def test_a_secret_that_is_missing_ends_the_sandbox_and_says_so(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, settings=SandboxSettings(journal=":memory:", secrets=["NO_SUCH_POOL_TOKEN"]))
    with pytest.raises(BadSetting, match="NO_SUCH_POOL_TOKEN"):
        pool.interpreter().start()
    assert wait_for_endings(WAIT_S)
    assert sandboxes.living == {}


# Exhaustion


def test_fail_fast_names_the_pool_and_who_holds_its_places(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, max_size=1, exhaustion="fail_fast")
    with pool.interpreter(session="case-7"):
        with pytest.raises(PoolExhausted, match=r"'p'.*1 places.*thread MainThread \(session 'case-7'\)") as raised:
            pool.interpreter().start()
        assert raised.value.pool == "p"
    pool.end_session("case-7")
    with pool.interpreter() as interpreter:
        assert interpreter.execute("1") == 1


def test_wait_waits_and_who_waits_in_vain_is_told_who_holds_it(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, max_size=1, wait_timeout_s=0.05)
    with pool.interpreter(), pytest.raises(PoolWaitTimeout, match=r"'p'.*thread MainThread"):
        pool.interpreter().start()


def test_the_queue_has_an_end(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, max_size=1, max_waiting=1)
    holder = started(pool)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(started, pool)
        until(pool, lambda status: len(status.waiting) == 1)
        with pytest.raises(PoolQueueFull, match="1 wait already"):
            pool.interpreter().start()
        holder.shutdown()
        waiting.result(WAIT_S).shutdown()


def until(pool: SandboxPool, holds: Any) -> None:
    """Return when the pool's status is so; the pool tells when it changes."""
    core = pool._core()
    from host_client.pool_status import status_of

    with core._changed:
        assert core._changed.wait_for(lambda: holds(status_of(core.config, core._book, core._clock())), WAIT_S)


def test_overflow_starts_an_extra_one_which_ends_after_its_use(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, max_size=1, exhaustion="overflow")
    one, two = started(pool, "a"), started(pool, "b")
    assert len(sandboxes.living) == 2
    two.shutdown()
    one.shutdown()
    assert wait_for_endings(WAIT_S)
    assert dict(pool.status().sessions) == {"a": "kept"}
    assert pool.status().counts["overflowed"] == 1


def test_thirty_two_threads_share_four_places(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, max_size=4, min_size=1)

    def run(_: int) -> Any:
        with pool.interpreter() as interpreter:
            return interpreter.execute("1")

    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(run, range(96))) == [1] * 96
    assert sandboxes.most <= 4
    assert wait_for_endings(WAIT_S)
    assert sandboxes.started >= 96, "none was used twice"


def test_who_holds_a_place_never_waits_for_another(sandboxes: Sandboxes) -> None:
    for exhaustion in ("wait", "fail_fast"):
        with make(sandboxes, max_size=1, exhaustion=exhaustion) as pool:
            depth: list[str] = []

            def nested(pool: SandboxPool = pool, depth: list[str] = depth) -> int:
                with pool.interpreter(tools={"nested": nested}) as inner:
                    depth.append(own_sandbox(inner))
                    sandboxes._steps = iter([call_nested if len(depth) < 4 else Step(value=4)])
                    return int(inner.execute("nested()"))

            assert nested() == 4
            assert len(set(depth)) == 4


def call_nested(execution: Any) -> Step:
    return Step(value=execution.call("nested"))


def test_a_session_that_asks_for_itself_is_refused_and_not_left_waiting(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, affinity="strict_queue", max_size=2)

    def same() -> None:
        pool.interpreter(session="a").start()

    sandboxes._steps = iter([lambda execution: Step(value=execution.call("same"))])
    caught: list[Exception] = []

    def tool() -> str:
        try:
            same()
        except PoolSessionBusy as error:
            caught.append(error)
        return "refused"

    with pool.interpreter(session="a", tools={"same": tool}) as outer:
        assert outer.execute("same()") == "refused"
    assert "would never end" in str(caught[0])


def test_what_is_held_reaches_the_threads_of_dspy() -> None:
    import dspy

    with holding_also((1, "a")), holding_also((2, None)):
        assert holding() == ((1, "a"), (2, None))
        executor = dspy.Parallel(num_threads=2, disable_progress_bar=True)

        class Tell(dspy.Module):  # type: ignore[misc]
            def forward(self, n: int) -> Any:
                return holding()

        assert executor([(Tell(), {"n": 1}), (Tell(), {"n": 2})]) == [((1, "a"), (2, None))] * 2
    assert holding() == ()


# Affinity


def test_a_session_finds_its_sandbox_and_the_tools_of_now(sandboxes: Sandboxes) -> None:
    sandboxes._steps = iter([Step(value=1), lambda execution: Step(value=execution.call("second"))])
    pool = make(sandboxes, affinity="strict_queue")
    with pool.interpreter(session="a", tools={"first": lambda: 1}) as one:
        one.execute("x = 1")
        first = own_sandbox(one)
    with pool.interpreter(session="a", tools={"second": lambda: 2}) as two:
        assert own_sandbox(two) == first
        assert two.execute("second()") == 2


def test_who_waits_for_a_session_gets_it_when_it_is_given_back(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, affinity="strict_queue", max_size=2)
    holder = started(pool, "a")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(started, pool, "a")
        until(pool, lambda status: len(status.waiting) == 1)
        own = own_sandbox(holder)
        holder.shutdown()
        assert own_sandbox(waiting.result(WAIT_S)) == own
    waiting.result().shutdown()


def test_who_waits_for_a_session_in_vain_is_told_who_has_it(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, affinity="strict_queue", wait_timeout_s=0.05)
    with pool.interpreter(session="a"), pytest.raises(PoolSessionBusy, match=r"'p'.*'a', which thread MainThread"):
        pool.interpreter(session="a").start()


def test_a_kept_sandbox_that_died_is_gone_for_its_strict_session(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, affinity="strict_fail_fast")
    with pool.interpreter(session="a") as one:
        handle = one.sandbox_handle
    sandboxes.lose(handle)
    with pytest.raises(PoolSessionGone, match=r"'a' is gone \(died\)"):
        pool.interpreter(session="a").start()
    assert pool.end_session("a")
    with pool.interpreter(session="a") as again:
        assert again.sandbox_handle != handle
    assert not pool.end_session("b")


def test_a_session_that_was_lost_in_use_is_gone(sandboxes: Sandboxes) -> None:
    sandboxes._steps = iter([Step(session_lost="exited(3)")])
    pool = make(sandboxes, affinity="strict_queue")
    interpreter = started(pool, "a")
    with pytest.raises(SessionLost):
        interpreter.execute("exit(3)")
    assert wait_for_endings(WAIT_S)
    with pytest.raises(PoolSessionGone):
        pool.interpreter(session="a").start()


def test_a_session_shut_down_while_it_executes_is_not_kept(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, affinity="hint")
    entered = threading.Event()

    def hang(_: Any) -> Step:
        entered.set()
        threading.Event().wait(WAIT_S) if interpreter.sandbox_handle else None
        return Step()

    sandboxes._steps = iter([hang])
    interpreter = started(pool, "a")
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(interpreter.execute, "hang()")
        assert entered.wait(WAIT_S)
        interpreter.shutdown(wait=True)
        with pytest.raises(SessionLost):
            running.result(WAIT_S)
    assert dict(pool.status().sessions) == {}


def test_ending_a_session_in_use_ends_it_at_its_shutdown(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, affinity="strict_queue")
    with pool.interpreter(session="a") as interpreter:
        assert pool.end_session("a")
        own = own_sandbox(interpreter)
    with pool.interpreter(session="a") as again:
        assert own_sandbox(again) != own


# Letting go


def test_shutdown_does_not_wait_for_the_end_but_execute_is_refused_at_once(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes)
    interpreter = started(pool)
    sandboxes.may_stop.clear()
    interpreter.shutdown()
    interpreter.shutdown()
    assert len(sandboxes.living) == 1
    sandboxes.may_stop.set()
    assert wait_for_endings(WAIT_S)
    assert sandboxes.living == {}


def test_an_interpreter_that_nobody_refers_to_gives_its_place_back(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, max_size=1)
    started(pool)  # let go of at once
    gc.collect()
    with pool.interpreter() as interpreter:
        assert interpreter.execute("1") == 1


def test_a_stale_reference_cannot_end_what_its_successor_has(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, affinity="strict_queue")
    one = started(pool, "a")
    session, loan = one._session, one._session.loan if one._session else None
    assert session is not None
    one.shutdown()
    with pool.interpreter(session="a") as two:
        session.release(loan)
        assert two.execute("1") == 1


def test_close_ends_what_is_unused_and_refuses_who_asks(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, min_size=2)
    assert pool.prewarm(wait=True)
    with pool.interpreter() as interpreter:
        pool.close()
        pool.close()
        assert len(sandboxes.living) == 1
        assert interpreter.execute("1") == 1, "what is in use goes on"
        with pytest.raises(PoolClosed, match="'p' was closed"):
            pool.interpreter().start()
    assert wait_for_endings(WAIT_S)
    assert sandboxes.living == {}


def test_a_start_under_way_at_close_leaves_nothing(sandboxes: Sandboxes) -> None:
    sandboxes.may_start.clear()
    pool = make(sandboxes, min_size=2)
    threading.Timer(0.05, sandboxes.may_start.set).start()
    pool.close()
    assert sandboxes.started == 2
    assert sandboxes.living == {}


def test_a_forked_child_does_not_use_its_parent_s_warm_sandboxes(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, min_size=1)
    assert pool.prewarm(wait=True)
    warm = set(sandboxes.living)
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            interpreter = get_pool("p").interpreter()
            interpreter.start()
            code = 0 if own_sandbox(interpreter) not in warm else 8
            interpreter.shutdown(wait=True)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert set(sandboxes.living) == warm


# Names and arguments


def test_pools_are_found_by_name(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, name="triage")
    assert get_pool("triage") is host_client.get_pool("triage") is pool
    assert pickle.loads(pickle.dumps(pool)) is pool
    with SandboxInterpreter(pool="triage") as interpreter:
        assert interpreter.execute("1") == 1
    with pytest.raises(UnknownPool, match="no pool 'analytics'; open are triage"):
        SandboxInterpreter(pool="analytics")
    with pytest.raises(UnknownPool, match="'analytics'"):
        SandboxInterpreter.factory(pool="analytics")
    with pytest.raises(BadSetting, match="'triage': there is one"):
        make(sandboxes, name="triage")
    pool.close()
    with pytest.raises(UnknownPool, match="none is open"):
        get_pool("triage")


def test_a_factory_takes_from_its_pool(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, tools={"one": lambda: 1}, execution_timeout_s=7)
    factory = pool.factory(execution_timeout_s=8)
    with factory() as interpreter:
        assert interpreter.execution_timeout_s == 8
        assert set(interpreter.tools) == {"one"}
        assert pool.status().states["leased"] == 1


@pytest.mark.parametrize("keyword", ["settings", "secrets", "provider", "sandbox", "attach", "journal"])
def test_what_is_the_pool_s_cannot_be_set_for_one_interpreter(sandboxes: Sandboxes, keyword: str) -> None:
    pool = make(sandboxes)
    values: dict[str, Any] = {"settings": SandboxSettings(memory="2g"), "secrets": ["A_TOKEN"], "provider": sandboxes}
    with pytest.raises(BadSetting, match=keyword):
        pool.factory(**{keyword: values.get(keyword, "x")})
    given = {keyword: MemoryJournal() if keyword == "journal" else values.get(keyword, "x")}
    with pytest.raises(BadSetting, match=keyword):
        SandboxInterpreter(pool=pool, **given)


def test_the_status_shows_people_what_a_pool_holds(sandboxes: Sandboxes) -> None:
    pool = make(sandboxes, min_size=1, max_size=2, settings=SETTINGS)
    assert pool.prewarm(wait=True)
    with pool.interpreter(session="a"):
        shown = str(pool.status())
    assert "pool p: 1 leased (keeps 1 warm, 2 places)" in shown
    assert "held by thread MainThread (session 'a') for 0." in shown
    assert "1 at once" in shown
