"""Four hooks around an RLM: a tool brought along, names that are forbidden, a hint after errors, a budget that stops.

The hooks are those of the page of dspy-rlm-hooks; only the import differs.

    python examples/hooks_example.py [--scripted] [--budget 0.50]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

import dspy

from host_client import SandboxInterpreter
from host_client.demo.chat_format import read_steps, write_fields
from host_client.demo.models import ScriptedActions, example_model
from host_client.demo.scripted_lm import Message
from host_client.hooks import (
    PostExecutionOutput,
    PostIterationOutput,
    PreExecutionOutput,
    PreIterationOutput,
    disable_rlm_hooks,
    enable_rlm_hooks,
)

SOURCE = """
def parse(text):  # TODO: say which line is wrong
    return eval(text)  # HACK

def load(path):
    return open(path).read()  # FIXME: close it
"""
FORBIDDEN = re.compile(r"\b(eval|exec|compile|__import__)\b")
MAX_COST_USD = 0.50


def pre_iteration(iteration: int, variables: Any, history: Any, input_args: Any) -> PreIterationOutput:
    """Bring a regex helper along, and a variable."""
    return PreIterationOutput(
        extra_vars={"search_pattern": r"TODO|FIXME|HACK"},
        python_code="""
import re

def grep(pattern, text):
    return re.findall(pattern, text)
""",
    )


def pre_execution(iteration: int, code: str, variables: Any, history: Any, input_args: Any) -> PreExecutionOutput:
    """Block names before they reach the interpreter: a nudge for the model; the boundary is the sandbox."""
    return PreExecutionOutput(code=FORBIDDEN.sub("# BLOCKED", code))


def post_execution(
    iteration: int, code: str, result: Any, variables: Any, history: Any, input_args: Any
) -> PostExecutionOutput | None:
    """After an error, tell the model what it has."""
    if isinstance(result, str) and result.startswith("[Error]"):
        return PostExecutionOutput(result=f"{result}\n# Hint: grep(search_pattern, text) is already in scope.")
    return None


def make_budget_hook(max_cost: float = MAX_COST_USD) -> Any:
    """Return a hook that counts the cost of one call; make one for each."""
    accumulated_cost = 0.0

    def post_iteration(iteration: int, pred: Any, code: str, result: Any, history: Any) -> PostIterationOutput:
        nonlocal accumulated_cost
        accumulated_cost += estimate_cost(pred)
        return PostIterationOutput(history=history, stop=accumulated_cost >= max_cost)

    return post_iteration


def estimate_cost(pred: Any) -> float:
    """Return what an iteration costs in dollars; in production, from ``pred.get_lm_usage()``."""
    return 0.015


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, and print each step and the answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scripted", action="store_true", help="without a model")
    parser.add_argument("--budget", type=float, default=MAX_COST_USD, help="in dollars")
    options = parser.parse_args(argv)
    with example_model(scripted, only_scripted=options.scripted):
        rlm = dspy.RLM("source, question -> markers: list[str]", interpreter_factory=SandboxInterpreter.factory())
        enable_rlm_hooks(
            rlm,
            pre_iteration_hook=pre_iteration,
            pre_execution_hook=pre_execution,
            post_execution_hook=post_execution,
            post_iteration_hook=make_budget_hook(options.budget),
        )
        result = rlm(source=SOURCE, question="Which markers of unfinished work are in the code, in their order?")
        disable_rlm_hooks(rlm)
    for number, step in enumerate(result.trajectory, 1):
        print(f"--- step {number}\n{step['code']}\n-> {step['output']}")
    print(f"{len(result.trajectory)} steps: {', '.join(result.markers)}")
    return 0


#: What the scripted model does instead of thinking.
ACTIONS = ScriptedActions(
    [
        ("I try the quick way first.", "print(eval(\"re.findall('[A-Z]+', source)\"))"),
        ("That was blocked. The hint names a helper.", "found = grep(search_pattern, source)\nprint(*found)"),
        ("That is all.", "SUBMIT(markers=found)"),
    ]
)


def scripted(messages: Sequence[Message]) -> str:
    """Play the actions; where the budget ended them, read the answer from the last output."""
    text = messages[-1].text
    if "[[ ## iteration ## ]]" in text:
        return ACTIONS(messages)
    last = read_steps(text.partition("[[ ## repl_history ## ]]")[2])[-1]
    markers = re.findall(r"TODO|FIXME|HACK", last.output.partition("\n\n")[0])
    return write_fields(markers=str(markers).replace("'", '"'))


if __name__ == "__main__":
    raise SystemExit(main())
