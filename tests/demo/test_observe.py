"""The wrapper watches an interpreter without changing what it does."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from dspy.primitives.code_interpreter import FinalOutput

from host_client import SandboxInterpreter, ScriptedBroker, progress
from host_client.demo.observe import ActionCallback, WatchedInterpreter, strip_fences, watch_tool
from host_client.demo.run_log import RunLog
from host_client.demo.screen import Screen
from host_client.scripted_broker import Step


class Scripted:
    """An interpreter whose code is a function of its tools."""

    def __init__(self, run: Callable[[dict[str, Any]], Any]) -> None:
        self.tools: dict[str, Callable[..., Any]] = {}
        self.output_fields: Any = None
        self.calls: list[str] = []
        self._run = run

    def start(self) -> None:
        self.calls.append("start")

    def execute(self, code: str, variables: dict[str, Any] | None = None) -> Any:
        self.calls.append("execute")
        return self._run(self.tools)

    def shutdown(self) -> None:
        self.calls.append("shutdown")


class Silent(Screen):
    def __init__(self) -> None:
        import io

        super().__init__(io.StringIO(), 80)


@pytest.fixture
def log() -> RunLog:
    return RunLog(Silent())


def watched(run: Callable[[dict[str, Any]], Any], log: RunLog) -> tuple[WatchedInterpreter, Scripted]:
    inner = Scripted(run)
    log.action_chosen("", "")
    return WatchedInterpreter(inner, log), inner


def test_it_is_an_interpreter_to_dspy(log: RunLog) -> None:
    from dspy.primitives.code_interpreter import CodeInterpreter

    assert isinstance(watched(lambda tools: None, log)[0], CodeInterpreter)


def test_tools_and_fields_go_to_the_inner_interpreter(log: RunLog) -> None:
    outer, inner = watched(lambda tools: None, log)
    outer.tools.update({"now": lambda: 1})
    outer.output_fields = [{"name": "answer"}]
    assert inner.tools["now"]() == 1
    assert (inner.output_fields, outer.output_fields) == ([{"name": "answer"}], [{"name": "answer"}])


def test_calls_are_counted_and_return_what_the_tool_returns(log: RunLog) -> None:
    outer, _ = watched(lambda tools: tools["llm_query_batched"](prompts=["a", "b"]), log)
    outer.tools["llm_query_batched"] = lambda prompts: [prompt.upper() for prompt in prompts]
    assert outer.execute("code") == ["A", "B"]
    assert (log.tool_calls, log.sub_queries, log.iterations[0].output) == (1, 2, "A\nB")


def test_wrapped_tool_is_the_same_object_in_every_execution(log: RunLog) -> None:
    outer, inner = watched(lambda tools: None, log)
    outer.tools["now"] = lambda: 1
    outer.execute("code")
    first = inner.tools["now"]
    outer.execute("code")
    assert inner.tools["now"] is first


def test_signature_and_docstring_of_a_tool_stay(log: RunLog) -> None:
    def look(path: str, *, limit: int = 3) -> str:
        """Look at a file."""
        return path

    seen = watch_tool("look", look, log)
    assert inspect.signature(seen) == inspect.signature(look)
    assert (seen.__doc__, seen.__name__) == ("Look at a file.", "look")


def test_async_tool_stays_async(log: RunLog) -> None:
    async def fetch(key: str) -> str:
        return key * 2

    log.action_chosen("", "")
    seen = watch_tool("fetch", fetch, log)
    assert inspect.iscoroutinefunction(seen)
    assert asyncio.run(seen("ab")) == "abab"
    assert log.tool_calls == 1


def test_error_of_a_tool_is_passed_on_and_noted(log: RunLog) -> None:
    def broken() -> None:
        raise KeyError("x")

    log.action_chosen("", "")
    with pytest.raises(KeyError):
        watch_tool("broken", broken, log)()
    assert log.iterations[0].tools[0].error == "KeyError"


def test_error_of_an_execution_is_passed_on_and_noted(log: RunLog) -> None:
    def fail(tools: dict[str, Any]) -> None:
        raise ZeroDivisionError("division by zero")

    outer, _ = watched(fail, log)
    with pytest.raises(ZeroDivisionError):
        outer.execute("1 / 0")
    assert (log.iterations[0].outcome, log.iterations[0].output) == ("error", "ZeroDivisionError: division by zero")


def test_submit_is_noted(log: RunLog) -> None:
    outer, _ = watched(lambda tools: FinalOutput({"answer": 1}), log)
    assert isinstance(outer.execute("SUBMIT(1)"), FinalOutput)
    assert log.iterations[0].outcome == "submitted"


def test_dspys_own_set_up_is_no_iteration(log: RunLog) -> None:
    outer, inner = watched(lambda tools: None, log)
    outer.tools["__dspy_call__"] = bridge = lambda: None
    outer.execute("shim", {"__dspy_host_token": "t"})
    assert log.iterations[0].outcome == "running"
    assert inner.tools["__dspy_call__"] is bridge


def test_inner_interpreter_is_started_once(log: RunLog) -> None:
    outer, inner = watched(lambda tools: None, log)
    outer.execute("a")
    outer.start()
    outer.shutdown()
    assert inner.calls == ["start", "execute", "shutdown"]


def test_only_replies_with_an_action_are_taken(log: RunLog) -> None:
    callback = ActionCallback(log)
    for outputs in (None, {"answer": "x"}, {"reasoning": "r", "code": "```python\n1\n```"}):
        callback.on_adapter_parse_end("id", outputs)
    assert [(record.reasoning, record.code) for record in log.iterations] == [("r", "1")]


@pytest.mark.parametrize("text", ["x = 1", "```python\nx = 1\n```", "```\nx = 1\n```\n", "\nx = 1\n"])
def test_fences_are_removed(text: str) -> None:
    assert strip_fences(text) == "x = 1"


def test_what_a_tool_reports_is_shown_while_it_runs() -> None:
    shown: list[tuple[str, str]] = []

    class Showing(Silent):
        def tool_progress(self, record: Any, tool: str, message: str) -> None:
            shown.append((tool, message))

    inner = SandboxInterpreter(
        provider=ScriptedBroker([lambda execution: Step(value=execution.call("search", 1))]),
        tools={"search": lambda pages: progress(0.5, "half") or pages},
    )
    log = RunLog(Showing())
    log.action_chosen("", "")
    watched = WatchedInterpreter(inner, log)
    assert watched.execute("search(1)") == 1
    watched.shutdown()
    assert shown == [("search", "50% · half")]


def test_somebody_elses_listener_is_left_in_place(log: RunLog) -> None:
    listener: list[Any] = []
    inner = SandboxInterpreter(provider=ScriptedBroker([]), on_tool_event=listener.append)
    before = inner.on_tool_event
    WatchedInterpreter(inner, log)
    assert inner.on_tool_event is before
