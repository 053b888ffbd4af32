"""The hot path stays within its recorded budget of calls, and a guard that fails says what to do."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from benchmarks import budget
from benchmarks.counting import METRICS, Counts


@pytest.fixture(scope="module")
def counts() -> Counts:
    return budget.measure()


def test_the_hot_path_keeps_its_budget(counts: Counts) -> None:
    lines = budget.exceeded(counts, budget.recorded())
    assert not lines, budget.advice(lines)


def test_host_broker_and_worker_of_every_operation_are_seen_and_a_tool_call_costs_more_than_none(
    counts: Counts,
) -> None:
    assert counts.keys() == budget.recorded().keys()
    for operation, roles in counts.items():
        assert roles.keys() == {"host", "broker", "worker"}, operation
        for role, metrics in roles.items():
            assert metrics.keys() == METRICS.keys()
            assert metrics["own_calls"] > 0, (operation, role)
            assert metrics["socket_calls"] > 0, (operation, role)
    plain, with_tool = counts["execution"], counts["execution with one tool call"]
    for role in plain:
        assert with_tool[role]["own_calls"] > plain[role]["own_calls"]


def test_a_count_past_its_headroom_is_named_with_the_command_that_updates_it(counts: Counts) -> None:
    grown = copy.deepcopy(counts)
    allowed = counts["execution"]["host"]["own_calls"]
    grown["execution"]["host"]["own_calls"] = budget.limit("own_calls", allowed) + 1
    [line] = budget.exceeded(grown, counts)
    assert line.startswith(f"execution, host: calls of functions in host_client and broker grew from {allowed} to ")
    assert budget.UPDATE in budget.advice([line])


def test_a_count_within_its_headroom_and_one_that_shrank_pass(counts: Counts) -> None:
    other = copy.deepcopy(counts)
    metrics = other["execution"]["broker"]
    metrics["own_calls"] = budget.limit("own_calls", metrics["own_calls"])
    metrics["library_calls"] = 0
    assert budget.exceeded(other, counts) == []


def test_an_operation_without_a_budget_fails_the_guard(counts: Counts) -> None:
    assert len(budget.exceeded(counts, {})) == sum(len(metrics) for r in counts.values() for metrics in r.values())


def test_a_recorded_budget_is_read_back(counts: Counts, tmp_path: Path) -> None:
    budget.record(counts, tmp_path / "budget.json")
    assert budget.recorded(tmp_path / "budget.json") == counts
