"""Claims about ``SandboxInterpreter``, against a scripted broker: no sandbox, no process, no socket."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import dspy
import pytest

from broker.protocol.messages import Outcome
from host_client import SandboxInterpreter, SandboxSettings, ScriptedBroker
from host_client.dspy_compat import contract
from host_client.errors import BadSetting, EngineUnavailable, SessionBusy, SessionLost, UnknownSandbox
from host_client.scripted_broker import ScriptedExecution, ScriptedStep, ScriptedToolError, Step

DSPY = contract()
WAIT_S = 10
Make = Callable[..., tuple[SandboxInterpreter, ScriptedBroker]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[SandboxInterpreter] = []

    def make(*steps: ScriptedStep, **keywords: Any) -> tuple[SandboxInterpreter, ScriptedBroker]:
        broker = ScriptedBroker(steps)
        interpreter = SandboxInterpreter(provider=broker, **keywords)
        made.append(interpreter)
        return interpreter, broker

    yield make
    for interpreter in made:
        interpreter.shutdown()


def _call(tool: str, *args: Any, **kwargs: Any) -> Callable[[ScriptedExecution], Step]:
    return lambda execution: Step(value=execution.call(tool, *args, **kwargs))


# The life of an interpreter.


def test_importing_the_package_imports_no_dspy() -> None:
    code = "import host_client, host_client.interpreter, sys; sys.exit('dspy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_starts_before_the_first_use_and_everything_only_once(make: Make) -> None:
    interpreter, broker = make(Step(value=2), Step(value=3))
    assert broker.started == 0
    assert interpreter.sandbox_handle is None
    interpreter.start()
    interpreter.start()
    assert interpreter.execute("1+1") == 2
    assert interpreter("1+2") == 3
    assert broker.started == 1
    assert interpreter.sandbox_handle is not None


def test_it_is_a_code_interpreter(make: Make) -> None:
    from dspy.primitives.code_interpreter import CodeInterpreter

    assert isinstance(make()[0], CodeInterpreter)


def test_a_with_statement_starts_and_stops_it() -> None:
    broker = ScriptedBroker([Step(value=2)])
    with SandboxInterpreter(provider=broker) as interpreter:
        assert broker.started == 1
        interpreter.execute("1+1")
    assert broker.stopped == 1


def test_shutdown_is_idempotent_even_before_the_start(make: Make) -> None:
    interpreter, broker = make()
    interpreter.shutdown()
    interpreter.shutdown()
    assert broker.stopped == 0


def test_after_shutdown_it_ends_or_starts_anew_as_the_dspy_version_wants(make: Make) -> None:
    interpreter, broker = make(Step(value=1), Step(value=2))
    interpreter.execute("1")
    interpreter.shutdown()
    if DSPY.reuses_after_shutdown:
        assert interpreter.execute("2") == 2
        assert broker.started == 2
        return
    with pytest.raises(SessionLost) as caught:
        interpreter.execute("2")
    assert caught.value.reason == "shutdown"
    with pytest.raises(SessionLost):
        interpreter.start()
    assert broker.started == 1


def test_a_forgotten_interpreter_stops_its_sandbox() -> None:
    broker = ScriptedBroker([_call("one")])
    interpreter = SandboxInterpreter(provider=broker, tools={"one": lambda: 1})
    assert interpreter.execute("one()") == 1
    gone = weakref.ref(interpreter)
    del interpreter
    gc.collect()
    assert gone() is None
    assert broker.stopped == 1


def test_an_interpreter_that_is_never_shut_down_stops_its_sandbox_at_exit() -> None:
    code = (
        "import logging; from host_client import SandboxInterpreter, ScriptedBroker\n"
        "from host_client.scripted_broker import Step\n"
        "class Loud(ScriptedBroker):\n"
        "    def stop(self, handle): print('stopped', handle.sandbox_id)\n"
        "interpreter = SandboxInterpreter(provider=Loud([Step(value=1)]))\n"
        "interpreter.execute('1')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "stopped scripted-1\n"


def test_no_thread_is_left_after_shutdown(make: Make) -> None:
    before = threading.active_count()
    interpreter, _ = make(_call("one"), tools={"one": lambda: 1})
    interpreter.execute("one()")
    interpreter.shutdown()
    assert threading.active_count() <= before


def test_a_named_sandbox_is_found_and_left_running(make: Make) -> None:
    interpreter, broker = make(Step(value=1), sandbox="scripted")
    interpreter.execute("1")
    interpreter.shutdown()
    assert (broker.started, broker.stopped) == (0, 0)
    other, _ = make(sandbox="nobody")
    with pytest.raises(UnknownSandbox, match="nobody"):
        other.execute("1")


def test_a_sandbox_that_cannot_start_is_the_providers_own_error_and_terminal(make: Make) -> None:
    interpreter, broker = make()

    def refuse(settings: SandboxSettings, *, name: str | None = None) -> Any:
        raise EngineUnavailable("no engine", help="start it")

    broker.start = refuse  # type: ignore[method-assign]
    with pytest.raises(EngineUnavailable, match="start it") as caught:
        interpreter.start()
    assert DSPY.terminal_base is None or isinstance(caught.value, DSPY.terminal_base)
    assert not isinstance(caught.value, DSPY.code_error)


def test_a_copy_is_a_fresh_interpreter_with_the_same_arguments(make: Make) -> None:
    interpreter, broker = make(Step(value=1), Step(value=2), tools={"one": lambda: 1}, execution_timeout_s=7.0)
    interpreter.execute("1")
    twin = copy.deepcopy(interpreter)
    assert twin.execute("2") == 2
    assert broker.started == 2
    assert (twin.execution_timeout_s, list(twin.tools)) == (7.0, ["one"])
    twin.shutdown()


# What is sent.


def test_settings_reach_the_request(make: Make) -> None:
    settings = SandboxSettings(max_output_bytes=2048, timeout_includes_tools=False)
    interpreter, broker = make(Step(), settings=settings, execution_timeout_s=None)
    interpreter.execute("1")
    request = broker.executions[0].request
    assert (request.timeout_s, request.max_output_bytes, request.timeout_includes_tools) == (None, 2048, False)


def test_tools_and_fields_are_sent_only_when_they_changed(make: Make) -> None:
    interpreter, broker = make(*[Step()] * 5, tools={"one": lambda: 1})
    interpreter.execute("a")
    interpreter.execute("b")
    interpreter.tools.update({"two": lambda: 2})
    interpreter.output_fields = [{"name": "answer"}]
    interpreter.execute("c")
    interpreter.output_fields = [{"name": "answer"}]
    interpreter.execute("d")
    interpreter.output_fields = None
    del interpreter.tools["one"]
    interpreter.execute("e")
    sent = [(e.request.tools, e.request.output_fields) for e in broker.executions]
    assert [tools and [tool.name for tool in tools] for tools, _ in sent] == [
        ["one"],
        None,
        ["one", "two"],
        None,
        ["two"],
    ]
    assert [None if fields is None else len(fields) for _, fields in sent] == [0, None, 1, None, 0]


def test_the_tools_dict_is_live_and_its_setter_copies(make: Make) -> None:
    interpreter, _ = make()
    live = interpreter.tools
    given = {"one": lambda: 1}
    interpreter.tools = given
    assert interpreter.tools is live
    assert live == given
    assert live is not given


def test_a_large_variable_is_sent_once(make: Make) -> None:
    context = "x" * 100_000
    interpreter, broker = make(Step(error=ValueError("before any line ran")), Step(), Step())
    for _ in range(3):
        try:
            interpreter.execute("1", {"context": context})
        except DSPY.code_error:
            continue
    assert [e.variables["context"] == context for e in broker.executions] == [True] * 3
    assert ["$ref" in e.request.variables["context"] for e in broker.executions] == [False, False, True]


# What cannot work is said before anything runs.


@pytest.mark.parametrize(
    ("code", "variables", "named"),
    [
        (b"1", None, "code must be a str"),
        ("1", {"a": [1, {"b": object()}]}, r"variable a\[1\]\['b'\]"),
        ("1", {"SUBMIT": 1}, "SUBMIT"),
        ("1", {"one": 1}, "name of a tool"),
        ("1", ["a"], "variables must be a dict"),
    ],
)
def test_wrong_arguments_are_named_and_terminal(make: Make, code: Any, variables: Any, named: str) -> None:
    interpreter, broker = make(Step(value=1), tools={"one": lambda: 1})
    with pytest.raises(BadSetting, match=named) as caught:
        interpreter.execute(code, variables)
    assert DSPY.terminal_base is None or isinstance(caught.value, DSPY.terminal_base)
    assert not isinstance(caught.value, DSPY.code_error)
    assert broker.executions == []
    assert interpreter.execute("1") == 1


def test_a_wrong_tool_added_later_is_named_at_the_next_execute(make: Make) -> None:
    interpreter, _ = make(Step(value=1))
    interpreter.tools["print"] = print
    with pytest.raises(BadSetting, match="print"):
        interpreter.execute("1")
    del interpreter.tools["print"]
    assert interpreter.execute("1") == 1


@pytest.mark.parametrize("keywords", [{"tools": {"class": len}}, {"execution_timeout_s": 0}, {"sandbox": ""}])
def test_wrong_keywords_are_refused_by_constructor_and_factory(keywords: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        SandboxInterpreter(**keywords)
    with pytest.raises(BadSetting):
        SandboxInterpreter.factory(**keywords)


# Results.


def test_last_result_has_everything(make: Make) -> None:
    interpreter, _ = make(Step(output="printed\n", value=0))
    assert interpreter.execute("0") == 0
    assert interpreter.last_result is not None
    assert (interpreter.last_result.output, interpreter.last_result.display) == ("printed\n", "0")
    assert interpreter.last_result.outcome is Outcome.OK


def test_with_output_fields_the_model_gets_text_and_value(make: Make) -> None:
    interpreter, _ = make(Step(output="printed\n", value=0), output_fields=[{"name": "answer"}])
    assert interpreter.execute("0") == "printed\n0"


def test_submit_gives_dspys_final_output(make: Make) -> None:
    interpreter, _ = make(Step(submitted={"answer": 42}))
    assert interpreter.execute("SUBMIT(42)") == DSPY.final_output({"answer": 42})


def test_an_error_in_the_code_leaves_the_session_usable(make: Make) -> None:
    interpreter, _ = make(Step(output="before\n", error=ZeroDivisionError("division by zero")), Step(value=1))
    with pytest.raises(
        DSPY.code_error, match="ZeroDivisionError: division by zero\n\nOutput before the error:\nbefore"
    ):
        interpreter.execute("1/0")
    assert interpreter.execute("1") == 1


def test_a_timeout_that_kept_the_namespace_is_repairable(make: Make) -> None:
    interpreter, _ = make(Step(outcome=Outcome.TIMED_OUT, error=TimeoutError("5 s")), Step(value=1))
    with pytest.raises(DSPY.code_error, match="variables set so far were kept"):
        interpreter.execute("while True: pass")
    assert interpreter.execute("1") == 1


def test_a_lost_session_is_terminal_now_and_later(make: Make) -> None:
    interpreter, broker = make(Step(session_lost="oom"), Step(value=1))
    for _ in range(3):
        with pytest.raises(SessionLost) as caught:
            interpreter.execute("x = bytes(10**12)")
        assert caught.value.reason == "oom"
        assert caught.value.code == "session_lost"
        assert not isinstance(caught.value, DSPY.code_error)
    assert (broker.started, broker.stopped) == (1, 1)
    assert len(broker.executions) == 1


# Tools.


def test_tools_run_on_the_host_and_their_results_come_back(make: Make) -> None:
    interpreter, _ = make(_call("add", 1, right=2), tools={"add": lambda left, right: left + right})
    assert interpreter.execute("add(1, right=2)") == 3


def test_a_tools_exception_has_its_name_and_text_and_no_traceback(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    class QuotaExceeded(Exception):
        pass

    def fail() -> None:
        raise QuotaExceeded("[dspy bridge lm-error #1] 429")

    interpreter, _ = make(_call("fail"), tools={"fail": fail})
    with pytest.raises(DSPY.code_error) as caught:
        interpreter.execute("fail()")
    assert str(caught.value) == "QuotaExceeded: [dspy bridge lm-error #1] 429"
    assert "test_interpreter.py" in caplog.text


def test_a_result_that_cannot_be_sent_fails_the_call_with_its_path(make: Make) -> None:
    interpreter, _ = make(_call("give"), tools={"give": lambda: {"a": [object()]}})
    with pytest.raises(DSPY.code_error, match=r"TypeError: result of tool give\(\)\['a'\]\[0\]"):
        interpreter.execute("give()")


def test_an_unknown_tool_is_refused_by_the_host_too(make: Make) -> None:
    interpreter, _ = make()
    interpreter.start()
    with pytest.raises(NameError, match="secret"):
        interpreter.invoke_tool("secret", [], {})


@pytest.mark.parametrize("kind", ["function", "method", "awaitable"])
def test_async_tools_are_awaited_even_when_the_caller_is_on_an_event_loop(make: Make, kind: str) -> None:
    class Tool:
        async def __call__(self, text: str) -> str:
            await asyncio.sleep(0)
            return text.upper()

    async def function(text: str) -> str:
        return await Tool()(text)

    tool = {"function": function, "method": Tool(), "awaitable": lambda text: Tool()(text)}[kind]
    interpreter, _ = make(_call("shout", "a"), _call("shout", "b"), tools={"shout": tool})

    async def on_a_loop() -> Any:
        return interpreter.execute("shout('a')")

    assert asyncio.run(on_a_loop()) == "A"
    assert interpreter.execute("shout('b')") == "B"


def test_tools_see_the_callers_context_and_cannot_change_it(make: Make) -> None:
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")

    def read_and_set() -> str:
        seen = who.get()
        who.set("tool")
        return seen

    interpreter, _ = make(
        lambda e: Step(value=[e.call("read"), e.call("read")]), _call("read"), tools={"read": read_and_set}
    )
    who.set("caller")
    assert interpreter.execute("read()") == ["caller", "caller"]
    who.set("later")
    assert interpreter.execute("read()") == "later"


def test_tools_see_dspy_context(make: Make) -> None:
    interpreter, _ = make(_call("budget"), tools={"budget": lambda: dspy.settings.get("my_budget")})
    with dspy.context(my_budget=7):
        assert interpreter.execute("budget()") == 7


def _all_at_once(tool: str, count: int) -> Callable[[ScriptedExecution], Step]:
    def step(execution: ScriptedExecution) -> Step:
        results: list[Any] = [None] * count

        def call(index: int) -> None:
            results[index] = execution.call(tool, index)

        threads = [threading.Thread(target=call, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return Step(value=results)

    return step


def test_concurrent_calls_run_concurrently(make: Make) -> None:
    together = threading.Barrier(8, timeout=WAIT_S)

    def meet(index: int) -> int:
        together.wait()
        return index

    interpreter, _ = make(_all_at_once("meet", 8), tools={"meet": meet})
    assert interpreter.execute("...") == list(range(8))


@pytest.mark.parametrize("slots", [1, 3])
def test_no_more_tools_run_at_once_than_allowed_and_none_is_forgotten(make: Make, slots: int) -> None:
    lock, running, most = threading.Lock(), 0, 0

    def work(index: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0)
        with lock:
            running -= 1
        return index

    settings = SandboxSettings(max_concurrent_tools=slots)
    interpreter, _ = make(_all_at_once("work", 60), tools={"work": work}, settings=settings)
    assert interpreter.execute("...") == list(range(60))
    assert most <= slots


def test_a_call_that_comes_when_a_slot_has_just_become_free_is_not_left_waiting(make: Make) -> None:
    """The waiting thread asked for nothing, because every slot was taken: somebody else must claim this one."""
    settings = SandboxSettings(max_concurrent_tools=1)

    def one_after_the_other(execution: ScriptedExecution) -> Step:
        return Step(value=[execution.call("work", index) for index in range(5)])

    interpreter, _ = make(one_after_the_other, tools={"work": lambda index: index}, settings=settings)
    assert interpreter.execute("...") == list(range(5))


def test_tool_threads_are_used_again(make: Make) -> None:
    seen: set[int] = set()

    def note() -> None:
        seen.add(threading.get_ident())

    interpreter, _ = make(*[_call("note")] * 30, tools={"note": note})
    for _ in range(30):
        interpreter.execute("note()")
    assert len(seen) <= 3


def test_a_second_execute_is_refused_at_once(make: Make) -> None:
    inside: list[BaseException] = []

    def again() -> None:
        try:
            interpreter.execute("2")
        except BaseException as error:
            inside.append(error)

    interpreter, _ = make(_call("again"), Step(value=1), tools={"again": again})
    interpreter.execute("again()")
    [refused] = inside
    assert isinstance(refused, SessionBusy)
    assert refused.status == 409
    assert not isinstance(refused, DSPY.code_error)
    assert interpreter.execute("1") == 1


def test_another_interpreter_may_work_inside_a_tool(make: Make) -> None:
    inner, _ = make(Step(value="inner"))
    interpreter, _ = make(_call("ask"), tools={"ask": lambda: inner.execute("...")})
    assert interpreter.execute("ask()") == "inner"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_a_tool_that_is_told_to_stop_stops_the_caller(make: Make, kind: type[BaseException]) -> None:
    def stop() -> None:
        raise kind

    def swallow(execution: ScriptedExecution) -> Step:
        try:
            execution.call("stop")
        except ScriptedToolError:
            return Step(never_ends=True)
        return Step()

    interpreter, _ = make(swallow, Step(value=1), tools={"stop": stop})
    with pytest.raises(kind):
        interpreter.execute("stop()")
    assert interpreter.execute("1") == 1


def test_a_hanging_tool_does_not_keep_its_thread_from_the_next_execution(make: Make) -> None:
    release = threading.Event()

    def call_and_never_hear(execution: ScriptedExecution) -> None:
        with contextlib.suppress(BaseException):
            execution.call("hang")

    def leave(execution: ScriptedExecution) -> Step:
        threading.Thread(target=call_and_never_hear, args=(execution,), daemon=True).start()
        assert called.wait(WAIT_S)
        return Step(outcome=Outcome.TIMED_OUT)

    called = threading.Event()
    tools = {"hang": lambda: (called.set(), release.wait(WAIT_S)), "one": lambda: 1}
    interpreter, _ = make(leave, _call("one"), tools=tools, settings=SandboxSettings(max_concurrent_tools=1))
    with pytest.raises(DSPY.code_error):
        interpreter.execute("hang()")
    assert interpreter.execute("one()") == 1
    release.set()


def test_variables_that_cannot_fit_are_refused_before_anything_is_sent(make: Make) -> None:
    settings = SandboxSettings(memory="64m", tmpfs="16m", journal=":memory:")
    interpreter, _ = make(Step(value=1), Step(value=2), settings=settings)
    half = "x" * (40 << 20)
    assert interpreter.execute("1", {"half": half}) == 1
    with pytest.raises(BadSetting, match=r"83,886,080 bytes do not fit.*67,108,864 bytes") as caught:
        interpreter.execute("2", {"half": half, "other": "y" * (40 << 20)})
    assert "RLM_SANDBOX_MEMORY" in str(caught.value)
    assert interpreter.execute("2", {"half": half}) == 2


# Interrupts and deaths.


def test_ctrl_c_stops_the_execution_and_keeps_the_session(make: Make) -> None:
    def press(execution: ScriptedExecution) -> Step:
        # A real one: _thread.interrupt_main() does not wake a main thread that waits.
        os.kill(os.getpid(), signal.SIGINT)
        return Step(never_ends=True)

    interpreter, broker = make(press, Step(value=1))
    with pytest.raises(KeyboardInterrupt):
        interpreter.execute("while True: pass")
    assert interpreter.execute("1") == 1
    assert broker.started == 1


def test_shutdown_from_another_thread_ends_a_running_execute(make: Make) -> None:
    def stop(execution: ScriptedExecution) -> Step:
        interpreter.shutdown()
        return Step(never_ends=True)

    interpreter, broker = make(stop)
    with pytest.raises(SessionLost) as caught:
        interpreter.execute("...")
    assert caught.value.reason == "shutdown"
    assert broker.stopped == 1


def test_shutdown_from_a_tool_ends_the_execute_around_it(make: Make) -> None:
    interpreter, broker = make(_call("stop"), tools={"stop": lambda: interpreter.shutdown()})
    with pytest.raises(SessionLost):
        interpreter.execute("stop()")
    assert broker.stopped == 1


def test_shutdown_during_the_start_leaves_nothing(make: Make) -> None:
    interpreter, broker = make(Step(value=1))
    connected = broker.connect

    def stop_meanwhile(handle: Any) -> Any:
        interpreter.shutdown()
        return connected(handle)

    broker.connect = stop_meanwhile  # type: ignore[method-assign]
    with pytest.raises(SessionLost):
        interpreter.execute("1")
    assert broker.stopped == 1


@pytest.mark.parametrize("reason", ["oom", "killed", "removed", "engine_gone"])
def test_a_sandbox_that_dies_is_reported_with_its_reason(make: Make, reason: str) -> None:
    def die(execution: ScriptedExecution) -> Step:
        broker.die(reason)
        return Step(never_ends=True)

    interpreter, broker = make(die)
    for _ in range(2):
        with pytest.raises(SessionLost) as caught:
            interpreter.execute("...")
        assert caught.value.reason == reason
    assert not isinstance(caught.value, DSPY.code_error)


def test_a_submission_that_is_no_object_ends_the_session(make: Make) -> None:
    interpreter, broker = make(Step(value=3, outcome=Outcome.SUBMITTED))
    with pytest.raises(SessionLost) as caught:
        interpreter.execute("...")
    assert caught.value.reason == "protocol"
    assert broker.stopped == 1


def test_a_script_that_has_come_to_its_end_says_so(make: Make) -> None:
    interpreter, _ = make()
    with pytest.raises(Exception, match="no step 1, for this code:\nprint"):
        interpreter.execute("print(1)")
