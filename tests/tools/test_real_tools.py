"""Claims about tools as generated code meets them, in real workers."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pytest

from broker.testing import InProcessBroker
from host_client import BadSetting, ToolEvent, progress, tool
from tests.tools.conftest import Make

MARK = "!"
WAIT_S = 10


@tool(where="sandbox")
def regex_extract(text: str, pattern: str, flags: int = re.IGNORECASE) -> list[str]:
    """Extract all matches of a pattern."""
    return [match + MARK for match in re.findall(pattern, text, flags)]


@tool(where="sandbox", requirements=["numpy"])
def mean(values: list[float]) -> float:
    """Return the mean."""
    return float(np.mean(values))


@tool(where="sandbox")
def count_calls() -> int:
    """Count its calls."""
    import itertools

    counter = count_calls.__dict__.setdefault("counter", itertools.count(1))
    return next(counter)


def fails_inside(value: int) -> float:
    """Divide."""
    return 1 / value


def needs_the_impossible() -> int:
    import module_that_is_not_there  # type: ignore[import-not-found]

    return int(module_that_is_not_there.x)


def test_a_tool_of_the_sandbox_runs_beside_one_of_the_host(make: Make) -> None:
    interpreter = make(tools=[regex_extract, tool(str.upper, name="shout")])
    assert interpreter.execute("regex_extract(shout('ab Ab'), pattern='ab')") == ["AB!", "AB!"]


def test_it_has_the_rights_of_generated_code_and_not_the_hosts_process(make: Make) -> None:
    @tool(where="sandbox")
    def where() -> int:
        """Say where it runs."""
        import os

        return os.getpid()

    interpreter = make(tools=[where])
    assert interpreter.execute("import os\nwhere() == os.getpid()") is True


def test_its_signature_and_docstring_are_shown(make: Make) -> None:
    interpreter = make(tools=[regex_extract])
    interpreter.execute("import inspect\nhelp(regex_extract)\nprint(inspect.getdoc(regex_extract))")
    assert interpreter.last_result is not None
    assert "regex_extract(text: str, pattern: str, flags: int = ...)" in interpreter.last_result.output.replace(
        repr(re.IGNORECASE), "..."
    )
    assert "Extract all matches of a pattern.\n\nReturns list[str]." in interpreter.last_result.output


def test_what_code_does_to_names_does_not_reach_it_and_it_is_put_back(make: Make) -> None:
    interpreter = make(tools=[regex_extract, count_calls])
    assert interpreter.execute("count_calls()") == 1
    interpreter.execute("regex_extract = count_calls = None\nre = MARK = findall = open = 5")
    assert interpreter.execute("regex_extract('a', 'A'), count_calls()") == [["a!"], 2]


def test_a_removed_tool_is_gone_and_a_changed_one_is_the_new_one(make: Make) -> None:
    interpreter = make(tools={"work": tool(fails_inside, where="sandbox")})
    assert interpreter.execute("work(2)") == 0.5
    interpreter.tools["work"] = regex_extract
    assert interpreter.execute("work('a', 'a')") == ["a!"]
    del interpreter.tools["work"]
    assert interpreter.execute("'work' in globals()") is False


def test_its_errors_are_ordinary_ones_with_a_traceback(make: Make) -> None:
    interpreter = make(tools={"work": tool(fails_inside, where="sandbox")})
    with pytest.raises(Exception, match=r"<tool work>.*\n.*return 1 / value[\s\S]*ZeroDivisionError"):
        interpreter.execute("work(0)")
    with pytest.raises(Exception, match=r"TypeError: fails_inside\(\) missing 1 required positional argument: 'value'"):
        interpreter.execute("work()")


def test_threads_may_call_it_at_once(make: Make) -> None:
    interpreter = make(tools=[regex_extract])
    interpreter.execute("from concurrent.futures import ThreadPoolExecutor")
    code = "list(ThreadPoolExecutor(8).map(lambda i: regex_extract('a', 'a'), range(40)))"
    assert interpreter.execute(code) == [["a!"]] * 40


def test_packages_that_are_there_are_found(make: Make) -> None:
    interpreter = make(tools=[mean, tool(mean.__wrapped__ if hasattr(mean, "__wrapped__") else mean, name="again")])
    assert interpreter.execute("mean([1, 2]) + again([1])") == 2.5


@pytest.mark.parametrize(
    ("requirement", "found"),
    [("rlm-no-such-package", "does not have it"), ("numpy==0.0.1", "has version [0-9.]+ of it")],
)
def test_a_missing_package_is_named_with_what_adds_it_before_any_code_runs(
    make: Make, requirement: str, found: str
) -> None:
    interpreter = make(tools={"work": tool(fails_inside, where="sandbox", requirements=[requirement])})
    package = requirement.partition("==")[0]
    with pytest.raises(
        BadSetting, match=rf"'work' needs '{requirement}', and .* {found}\s+.*packages=\('{package}',\)"
    ):
        interpreter.execute("print('ran')")
    assert interpreter.last_result is None
    interpreter.tools.clear()
    assert interpreter.execute("1 + 1") == 2


def test_an_import_that_fails_inside_is_an_error_of_the_code(make: Make) -> None:
    interpreter = make(tools={"work": tool(needs_the_impossible, where="sandbox")})
    with pytest.raises(Exception, match="ModuleNotFoundError"):
        interpreter.execute("work()")
    assert interpreter.execute("1 + 1") == 2


def test_source_that_fails_over_there_is_a_typed_error(make: Make) -> None:
    interpreter = make(tools=[mean])
    assert interpreter.execute("import sys\nsys.modules['numpy'] = None\n1") == 1  # the check was before
    code = "try:\n    mean([1])\nexcept RuntimeError as e:\n    text = f'{type(e).__name__}: {e}'\ntext"
    assert interpreter.execute(code).startswith("ToolUnavailable: mean() cannot run in this sandbox: ")


FORGED = """
import json, os, socket, sys
calls = next(c.cell_contents for c in ours.__closure__ if hasattr(c.cell_contents, '__self__'))
try:
    calls('regex_extract', (), ('a', 'a'), {})
    said = 'done'
except Exception as error:
    said = str(error)
said
"""


def test_a_forged_call_of_it_is_refused_by_the_broker(make: Make) -> None:
    interpreter = make(tools={"regex_extract": regex_extract, "ours": lambda: 1})
    said = interpreter.execute(FORGED)
    assert "there is no tool 'regex_extract'; the tools of this session: ours" in said


def test_a_forged_call_that_reached_the_host_is_refused_there(make: Make) -> None:
    interpreter = make(tools={"regex_extract": regex_extract})
    interpreter.execute("1")
    with pytest.raises(NameError, match="it runs in the sandbox"):
        interpreter.invoke_tool("regex_extract", ["a", "a"], {})


def test_budget_and_time_are_typed_errors_in_the_code(make: Make) -> None:
    go = threading.Event()

    @tool(max_calls=2)
    def few() -> int:
        return 1

    @tool(timeout_s=0.05)
    def slow() -> None:
        go.wait(WAIT_S)

    interpreter = make(tools=[few, slow])
    code = """
said = []
for function in (few, few, few, slow):
    try:
        said.append(function())
    except Exception as error:
        said.append([type(error).__name__, getattr(error, 'type', ''), str(error)])
said
"""
    one, two, third, late = interpreter.execute(code)
    go.set()
    assert (one, two) == (1, 1)
    assert third[:2] == ["ToolError", "ToolBudgetExceeded"]
    assert "few() may be called 2 times" in third[2]
    assert late[0] == "TimeoutError"
    assert "slow() did not answer within its 0.05 s" in late[2]
    assert interpreter.execute("few()") == 1  # the budget is one execution's


def test_a_crowd_of_calls_fills_the_places_and_never_more(make: Make) -> None:
    lock, inside, most, pair = threading.Lock(), [0], [0], threading.Barrier(2)

    @tool(max_concurrent=2)
    def work(i: int) -> int:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        pair.wait(WAIT_S)
        with lock:
            inside[0] -= 1
        return i

    interpreter = make(tools=[work])
    code = "from concurrent.futures import ThreadPoolExecutor as P\nlist(P(16).map(work, range(64)))"
    assert interpreter.execute(code) == list(range(64))
    assert most[0] == 2


def test_progress_reaches_the_listener_with_call_and_execution(make: Make) -> None:
    seen: list[ToolEvent] = []

    @tool
    def read(pages: int) -> int:
        for page in range(pages):
            progress(page / pages, f"page {page}")
        return pages

    interpreter = make(tools=[read], on_tool_event=seen.append)
    assert interpreter.execute("read(2)") == 2
    assert [event.kind for event in seen] == ["started", "progress", "progress", "ended"]
    assert [event.message for event in seen[1:3]] == ["0% · page 0", "50% · page 1"]
    assert len({(event.call_id, event.execution_id) for event in seen}) == 1
    assert seen[0].call_id


def test_rlm_lists_a_tool_of_the_sandbox_and_its_code_calls_it(make: Make, running_broker: InProcessBroker) -> None:
    import dspy

    from host_client import SandboxInterpreter
    from host_client.providers.fake import FakeProvider

    def reply(code: str) -> dict[str, str]:
        return {"reasoning": "So.", "code": code}

    lm = dspy.utils.DummyLM([reply("x = regex_extract(text, 'a+')\nprint(x)"), reply("SUBMIT(answer=x[0])")])
    factory = SandboxInterpreter.factory(provider=FakeProvider(running_broker))
    rlm = dspy.RLM("text -> answer", tools=[regex_extract], interpreter_factory=factory)
    with dspy.context(lm=lm):
        prediction: Any = rlm(text="baab")
    assert prediction.answer == "aa!"
    assert "Extract all matches of a pattern." in rlm.generate_action.signature.instructions
