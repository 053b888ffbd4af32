"""Contenders take turns, nothing is dropped in silence, and what is slow does not hold up the run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks.agents import AgentGone
from benchmarks.cases import Case
from benchmarks.curves import POINT_LIMIT_S, Curve
from benchmarks.measure import Figure, Run, _goes_on
from benchmarks.state import State, WrongAnswer, timed


class FakeAgent:
    """Answers with the same sample, and notes who was asked."""

    def __init__(
        self, name: str, asked: list[str], sample: float = 1.0, *, lacks: frozenset[str] = frozenset()
    ) -> None:
        self.name, self.lacks, self.slow = name, lacks, False
        self.asked, self.value = asked, sample
        self.fails: dict[str, Any] | AgentGone | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        if request["op"] == "prepare" and self.fails is None:
            return {}
        self.asked.append(self.name)
        if isinstance(self.fails, AgentGone):
            raise self.fails
        if self.fails is not None:
            return self.fails
        if request["op"] == "point":
            return {"point": {"wall_s": self.value * request["x"]}}
        return {"samples": [self.value] * request["count"], "cpu_s": {"host": 0.5}}


def case(key: str = "one", **changes: Any) -> Case:
    return Case(key, key, lambda state: 0.0, rounds=2, batch=3, **changes)


def curve(*points: int) -> Curve:
    return Curve("c", "c", "size", ("wall_s", "ms"), points, lambda state, x: {}, in_bytes=True)


def test_the_order_of_the_turns_changes() -> None:
    asked: list[str] = []
    agents = [FakeAgent(name, asked) for name in "abc"]
    Run(agents).cases([dataclasses.replace(case(), rounds=20)])
    rounds = ["".join(asked[at : at + 3]) for at in range(6, len(asked), 3)]
    assert len(rounds) == 20
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 3


def test_contenders_take_turns_and_the_first_sample_does_not_count() -> None:
    asked: list[str] = []
    run = Run([FakeAgent("a", asked), FakeAgent("b", asked, 2.0)])
    run.cases([case()])
    assert asked[:4] == ["a", "a", "b", "b"]  # the second one tells how many fit into a turn
    assert [sorted(asked[4:6]), sorted(asked[6:])] == [["a", "b"], ["a", "b"]]
    assert run.outcome.figures == [
        Figure("one", "a", "s", (1.0,) * 6, {"host": 0.5}),
        Figure("one", "b", "s", (2.0,) * 6, {"host": 0.5}),
    ]


def test_a_contender_that_lacks_what_a_case_needs_is_named() -> None:
    run = Run([FakeAgent("a", []), FakeAgent("b", [], lacks=frozenset({"tools"}))])
    run.cases([case(needs=frozenset({"tools"}))])
    assert [figure.contender for figure in run.outcome.figures] == ["a"]
    assert run.outcome.left_out == {("b", "generated code cannot call the host"): ["one"]}


def test_a_contender_that_fails_a_case_leaves_that_case_only() -> None:
    failing = FakeAgent("b", [])
    failing.fails = {"error": "WrongAnswer: 3"}
    run = Run([FakeAgent("a", []), failing])
    run.cases([case("one")])
    failing.fails = None
    run.cases([case("two")])
    assert [(f.case, f.contender) for f in run.outcome.figures] == [("one", "a"), ("two", "a"), ("two", "b")]
    assert run.outcome.left_out == {("b", "it failed: WrongAnswer: 3"): ["one"]}


def test_a_contender_whose_process_is_gone_leaves_the_run_and_is_named_once() -> None:
    gone = FakeAgent("b", [])
    gone.fails = AgentGone("its process ended with status 1")
    run = Run([FakeAgent("a", []), gone])
    run.cases([case("one"), case("two")])
    assert [(f.case, f.contender) for f in run.outcome.figures] == [("one", "a"), ("two", "a")]
    assert run.outcome.left_out == {("b", "its process ended with status 1"): ["one and all that follows"]}


def test_a_curve_ends_before_a_point_that_would_take_too_long() -> None:
    run = Run([FakeAgent("a", [], POINT_LIMIT_S / 10)])
    run.curves([curve(1, 4, 1000)], ["a"])
    assert [point.x for point in run.outcome.points] == [1, 4]
    assert run.outcome.left_out == {("a", "it would take more than 8 s"): ["c from 1,000 on"]}


@pytest.mark.parametrize(
    ("took_s", "samples", "more"),
    [(0.4, 8, True), (0.4, 9, False), (0.6, 4, True), (0.6, 5, False), (4.1, 1, False)],
)
def test_a_point_of_a_curve_is_no_single_sample_unless_one_takes_long(took_s: float, samples: int, more: bool) -> None:
    assert _goes_on(took_s, samples) is more


def test_a_wrong_answer_is_an_error_and_no_sample() -> None:
    assert timed(lambda: 2, 2) >= 0
    with pytest.raises(WrongAnswer):
        timed(lambda: 3, 2)


def test_a_state_starts_each_interpreter_once_replaces_lost_ones_and_shuts_all_of_them_down() -> None:
    made: list[Any] = []

    class Interpreter:
        ended = lost = False

        def execute(self, code: str) -> int:
            if self.lost:
                raise RuntimeError("lost")
            return 2

        def shutdown(self) -> None:
            self.ended = True

    class Contender:
        def make(self, tools: Any, variant: str = "plain") -> Interpreter:
            made.append(Interpreter())
            return made[-1]

    state = State(Contender())  # type: ignore[arg-type]
    assert state.warm() is state.warm()
    assert state.warm("roomy") is not state.warm()
    assert len(made) == 2
    made[0].lost = True
    state.drop_lost()
    assert state.warm() is made[2]
    state.close()
    assert all(interpreter.ended for interpreter in made)
