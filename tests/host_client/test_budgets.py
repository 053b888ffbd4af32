"""Claims about accounts and limits; what DSPy's modules make of them is in tests/conformance/test_history.py."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from host_client import (
    BadSetting,
    Budget,
    BudgetExceeded,
    SandboxInterpreter,
    SandboxSettings,
    ScriptedBroker,
    spending,
)
from host_client.budgets import GRACE_EXECUTIONS, GRACE_S, budget, reserve
from host_client.scripted_broker import Step
from host_client.spending import Account


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


Make = Callable[..., SandboxInterpreter]


@pytest.fixture
def make() -> Make:
    def make_one(*steps: Any, **keywords: Any) -> SandboxInterpreter:
        settings = SandboxSettings(journal=":memory:", history=False)
        return SandboxInterpreter(provider=ScriptedBroker(steps), settings=settings, **keywords)

    return make_one


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_seconds": 0}, "max_seconds"),
        ({"max_calls": -1}, "max_calls"),
        ({"max_calls": 1.5}, "max_calls"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_cost": float("inf")}, "max_cost"),
        ({"max_cost": "1"}, "max_cost"),
        ({}, "limits nothing"),
    ],
)
def test_a_limit_that_cannot_work_is_refused_by_name(limits: dict[str, Any], named: str) -> None:
    with pytest.raises(BadSetting, match=named):
        Budget(**limits)


def test_a_budget_of_another_type_is_refused(make: Make) -> None:
    with pytest.raises(BadSetting, match="budget must be a Budget, got int"):
        make(budget=10)
    with pytest.raises(BadSetting, match="budget must be a Budget"):
        SandboxInterpreter.factory(budget={"max_calls": 1})


def test_a_block_counts_what_is_spent_in_it_and_in_the_threads_that_carry_its_context() -> None:
    with Budget(max_calls=10) as outer, Budget(max_calls=5) as inner:
        reserve("llm_query", 1)
        thread = threading.Thread(target=contextvars.copy_context().run, args=(reserve, "llm_query_batched", 3))
        thread.start()
        thread.join()
    reserve("llm_query", 1)  # after the block: nobody's
    assert (outer.spent()["calls"], inner.spent()["calls"]) == (4, 4)
    assert (outer.left(), inner.left()) == ({"calls": 6}, {"calls": 1})


def test_nothing_is_charged_where_one_of_the_budgets_around_says_no() -> None:
    with Budget(max_calls=1) as outer, Budget(max_calls=5) as inner:
        with pytest.raises(BudgetExceeded, match="2 sub-calls do not fit") as caught:
            reserve("llm_query_batched", 2)
        assert (caught.value.budget, caught.value.limit, caught.value.spent) == ("max_calls", 1, 0)
        reserve("llm_query", 1)
    assert (outer.spent()["calls"], inner.spent()["calls"]) == (1, 1)


def test_many_threads_cannot_pass_a_limit_together() -> None:
    def ask(_: int) -> bool:
        try:
            reserve("llm_query", 1)
        except BudgetExceeded:
            return False
        return True

    with Budget(max_calls=7) as limit:
        context = contextvars.copy_context()
        with ThreadPoolExecutor(16) as pool:
            passed = list(pool.map(lambda number: context.copy().run(ask, number), range(64)))
    assert sum(passed) == 7
    assert limit.spent()["calls"] == 7


def test_time_is_counted_from_the_first_block_and_stands_still_between_blocks() -> None:
    clock = Clock()
    limit = Budget(max_seconds=10, clock=clock)
    with limit:
        clock.now += 4
    clock.now += 100
    assert limit.spent()["seconds"] == 4
    with limit:
        clock.now += 3
        assert budget() == {"seconds": 3.0}
        clock.now += 3
        error = limit.used_up()
    assert error is not None
    assert (error.budget, error.limit, error.spent) == ("max_seconds", 10, 10)


def test_what_is_left_is_the_least_of_all_budgets_around() -> None:
    with Budget(max_calls=10, max_cost=1.0), Budget(max_calls=3):
        assert budget() == {"calls": 3, "cost": 1.0}
    assert budget() == {}


def test_a_tool_that_was_seen_to_ask_a_model_is_refused_when_nothing_is_left() -> None:
    with Budget(max_calls=1) as limit:
        reserve("classify", None)
        with spending.ServingTool("classify", counted=False):
            spending.begin_model_call()
        assert limit.spent()["calls"] == 1
        with pytest.raises(BudgetExceeded):
            reserve("classify", None)
        reserve("save", None)  # never asked anybody


def test_what_llm_query_asks_is_not_counted_twice() -> None:
    with Budget(max_calls=9) as limit:
        reserve("llm_query", 1)
        with spending.ServingTool("llm_query", counted=True):
            spending.begin_model_call()
    assert limit.spent()["calls"] == 1


def test_calls_of_models_without_a_price_are_told() -> None:
    with Budget(max_cost=1.0) as limit:
        spending.note_model_call(tokens=5, cost=0.25, priced=True)
        spending.note_model_call(tokens=5, cost=0.0, priced=False)
    assert (limit.spent()["cost"], limit.spent()["tokens"], limit.unpriced) == (0.25, 10, 1)


def test_closing_an_account_closes_those_that_were_left_open_in_it() -> None:
    outer, inner = Account(), Account()
    spending.open_account(outer)
    spending.open_account(inner)
    spending.close_account(outer)
    spending.close_account(inner)
    assert spending.accounts.get() == ()


def test_code_goes_on_for_as_many_executions_as_the_grace_and_then_no_more(make: Make) -> None:
    clock = Clock()
    interpreter = make(*[Step(output="on\n")] * 9, output_fields=[{"name": "answer"}])
    with Budget(max_seconds=5, clock=clock):
        assert interpreter.execute("1") == "on"
        clock.now += 6
        for left in range(GRACE_EXECUTIONS - 1, -1, -1):
            said = interpreter.execute("2")
            assert said.startswith("on\n[the budget max_seconds=5 is used up (spent 6): SUBMIT now")
            assert f"{left} executions are left" in said
        with pytest.raises(BudgetExceeded, match="max_seconds=5"):
            interpreter.execute("3")
    assert interpreter.execute("4") == "on"


def test_a_run_without_sub_calls_left_may_compute_until_it_asks_for_one_more(make: Make) -> None:
    steps = [Step(output="on\n")] * 5
    interpreter = make(*steps)
    with Budget(max_calls=1):
        reserve("llm_query", 1)
        for _ in range(GRACE_EXECUTIONS + 1):
            interpreter.execute("1")
        with pytest.raises(BudgetExceeded):
            reserve("llm_query", 1)
        for _ in range(GRACE_EXECUTIONS):
            interpreter.execute("1")
        with pytest.raises(BudgetExceeded):
            interpreter.execute("1")


@pytest.mark.parametrize(
    ("own", "left", "expected"), [(300.0, 60, 60), (30.0, 60, 30), (None, 60, 60), (300.0, 1, GRACE_S)]
)
def test_an_execution_gets_no_more_time_than_is_left(
    make: Make, own: float | None, left: float, expected: float
) -> None:
    clock = Clock()
    interpreter = make(execution_timeout_s=own)
    with Budget(max_seconds=left, clock=clock):
        assert interpreter._watch.timeout_s(own) == expected
    assert interpreter._watch.timeout_s(own) == own


def test_generated_code_has_budget_while_something_is_limited_and_the_user_has_nothing_of_that_name(make: Make) -> None:
    mine = make(Step(value=1), Step(value=1), Step(value=1))
    with Budget(max_calls=3):
        mine.execute("budget()")
        assert mine.tools["budget"] is budget
        mine.execute("budget", {"budget": 1_000})
        assert "budget" not in mine.tools
        mine.execute("budget()")
        assert "budget" in mine.tools
    theirs = make(Step(value=1), tools={"budget": len})
    with Budget(max_calls=3):
        theirs.execute("budget('x')")
    assert theirs.tools["budget"] is len


def test_the_instructions_tell_of_a_budget() -> None:
    assert "budget()" in SandboxInterpreter.factory(budget=Budget(max_calls=1)).execution_instructions
    assert "budget()" not in SandboxInterpreter.factory().execution_instructions
