"""Times and counts of a run add up."""

from __future__ import annotations

import pytest

from host_client.demo.run_log import IterationRecord, RunLog, ToolRecord


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def sandbox_ready(self, seconds: float) -> None:
        self.told.append(f"ready {seconds}")

    def action_chosen(self, record: IterationRecord) -> None:
        self.told.append(f"action {record.number}")

    def tool_started(self, record: IterationRecord, tool: ToolRecord) -> None:
        self.told.append(f"tool {tool.name} in {record.number}")

    def iteration_ended(self, record: IterationRecord) -> None:
        self.told.append(f"ended {record.number} {record.outcome}")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def log(clock: FakeClock, notes: Notes) -> RunLog:
    return RunLog(notes, clock=clock)


def test_time_is_split_into_model_sandbox_and_tools(log: RunLog, clock: FakeClock) -> None:
    log.sandbox_ready(0.5)
    clock.now += 2
    log.action_chosen("why", "print()")
    log.execution_started()
    clock.now += 0.25
    tool = log.tool_started("llm_query_batched", 7)
    clock.now += 3
    log.tool_ended(tool, None)
    clock.now += 0.5
    log.execution_ended("out", "ok")
    [record] = log.iterations
    assert (record.model_s, record.execute_s, record.tools_s, record.sandbox_s) == (2, 3.75, 3, 0.75)
    assert (tool.seconds, log.sub_queries, log.tool_calls, log.startup_s) == (3, 7, 1, 0.5)


def test_tools_that_overlap_are_not_counted_twice(log: RunLog, clock: FakeClock) -> None:
    log.action_chosen("", "")
    log.execution_started()
    first = log.tool_started("a", None)
    clock.now += 1
    second = log.tool_started("b", None)
    clock.now += 1
    log.tool_ended(first, None)
    clock.now += 1
    log.tool_ended(second, "ValueError")
    log.execution_ended("", "ok")
    [record] = log.iterations
    assert (record.tools_s, record.sandbox_s) == (3, 0)
    assert [(tool.name, tool.seconds, tool.error) for tool in record.tools] == [("a", 2, None), ("b", 2, "ValueError")]


def test_replies_of_sub_agents_are_no_iterations(log: RunLog) -> None:
    log.action_chosen("outer", "code")
    log.execution_started()
    log.action_chosen("nested", "code")
    log.execution_ended("", "ok")
    assert [record.reasoning for record in log.iterations] == ["outer"]


def test_code_that_was_never_run_is_closed_by_the_next_action(log: RunLog, notes: Notes) -> None:
    log.action_chosen("bash fence", "ls")
    log.action_chosen("python now", "1")
    assert (log.iterations[0].outcome, log.iterations[0].output) == ("error", "(not executed)")
    assert notes.told == ["action 1", "ended 1 error", "action 2"]


def test_watcher_hears_everything_in_order(log: RunLog, notes: Notes) -> None:
    log.sandbox_ready(1.0)
    log.action_chosen("", "")
    log.execution_started()
    log.tool_ended(log.tool_started("t", None), None)
    log.execution_ended("", "submitted")
    assert notes.told == ["ready 1.0", "action 1", "tool t in 1", "ended 1 submitted"]
    assert log.to_json()[0]["tools"][0]["name"] == "t"
