"""Pools under DSPy's own threads: Evaluate with more threads than places, and RLMs inside tools of others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import dspy
import pytest

from host_client import SandboxPool, SandboxSettings, wait_for_endings
from host_client.scripted_broker import ScriptedExecution, Step
from tests.conformance import dspy_versions as versions
from tests.conformance.dspy_versions import rlm, writes
from tests.host_client.pool_fixtures import Sandboxes

SETTINGS = SandboxSettings(journal=":memory:")
# Parsed here: CPython 3.11's ast.parse, which DSPy uses for signatures, fails now and then in parallel threads.
SIGNATURE = dspy.Signature("n -> answer")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def run(pool: SandboxPool, code: str, n: str, **keywords: Any) -> Any:
    """One forward of an RLM whose model writes this code."""
    program = rlm(SIGNATURE, pool.factory(), **keywords)
    with dspy.context(lm=writes(code)):
        prediction = program(n=n)
    if not versions.HAS_FACTORY:
        program._interpreter.shutdown()
    return prediction


@pytest.fixture
def sandboxes() -> Iterator[Sandboxes]:
    def double(execution: ScriptedExecution) -> Step:
        return Step(submitted={"answer": execution.variables["n"] * 2})

    made = Sandboxes(itertools.repeat(double))
    yield made
    assert wait_for_endings(30)
    assert made.living == {}


def evaluate(program: Any, examples: int) -> float:
    devset = [dspy.Example(n=f"<{i}>", answer=f"<{i}><{i}>").with_inputs("n") for i in range(examples)]
    result = dspy.Evaluate(
        devset=devset,
        metric=lambda example, prediction, trace=None: example.answer == prediction.answer,
        num_threads=32,
        display_progress=False,
        provide_traceback=True,
    )(program)
    return float(getattr(result, "score", result))


def test_thirty_two_threads_of_evaluate_share_four_places_and_all_finish(sandboxes: Sandboxes) -> None:
    with SandboxPool(name="evaluate", max_size=4, settings=SETTINGS, provider=sandboxes) as pool:

        class Program(dspy.Module):  # type: ignore[misc]
            def forward(self, n: str) -> Any:
                return run(pool, "SUBMIT(double(n))", n)

        assert evaluate(Program(), 64) == 100.0
        assert sandboxes.most <= 4
        assert pool.status().counts["overflowed"] == 0


def test_nested_rlms_under_evaluate_finish_on_a_pool_of_two(sandboxes: Sandboxes) -> None:
    def nest_or_double(execution: ScriptedExecution) -> Step:
        n = execution.variables["n"]
        return Step(submitted={"answer": execution.call("ask", n) if "outer" in execution.code else n * 2})

    sandboxes._steps = itertools.repeat(nest_or_double)
    with SandboxPool(name="nested", max_size=2, settings=SETTINGS, provider=sandboxes) as pool:

        def ask(n: str) -> str:
            return str(run(pool, "SUBMIT(n * 2)", n).answer)

        class Outer(dspy.Module):  # type: ignore[misc]
            def forward(self, n: str) -> Any:
                return run(pool, "SUBMIT(ask(n))  # outer", n, tools=[ask])

        assert evaluate(Outer(), 32) == 100.0
        assert sandboxes.most <= 4, "two places, and one inside each"
