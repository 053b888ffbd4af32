"""Claims about the interpreter that hold in every DSPy version, on the script, the real broker and a container."""

from __future__ import annotations

import math
from typing import Any

import dspy
import pydantic
import pytest
from dspy.primitives import code_interpreter
from dspy.primitives.code_interpreter import CodeInterpreter, CodeInterpreterError, FinalOutput

from broker.protocol.messages import Outcome
from host_client.errors import SessionLost
from host_client.scripted_broker import ScriptedExecution, Step
from tests.conformance.backends import Backend
from tests.conformance.dspy_versions import HAS_CODE_EXECUTION_ERROR

CODE_ERROR: type[Exception] = getattr(code_interpreter, "CodeExecutionError", CodeInterpreterError)
FIELDS = [{"name": "answer", "type": "str"}]


def _calls(tool: str, *args: Any, **kwargs: Any) -> Any:
    return lambda execution: Step(value=execution.call(tool, *args, **kwargs))


def test_it_satisfies_the_protocol_and_its_factory_does_not(core_backend: Backend) -> None:
    factory = core_backend.factory()
    assert isinstance(factory(), CodeInterpreter)
    assert not isinstance(factory, CodeInterpreter)
    assert isinstance(factory.execution_instructions, str)


@pytest.mark.parametrize(
    ("code", "step", "value"),
    [
        ("1 + 1", Step(value=2), 2),
        ("'text\\n'", Step(value="text\n"), "text\n"),
        ("[1, {'a': None}]", Step(value=[1, {"a": None}]), [1, {"a": None}]),
        ("print('a'); print('b')", Step(output="a\nb\n"), "a\nb"),
        ("x = 1", Step(), None),
        ("", Step(), None),
        ("# nothing", Step(), None),
        ("print('a')\n0", Step(output="a\n", value=0), 0),
    ],
)
def test_code_gets_the_value_or_the_text(core_backend: Backend, code: str, step: Step, value: Any) -> None:
    result = core_backend.make(step).execute(code)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("code", "step", "shown"),
    [
        ("0", Step(value=0), "0"),
        ("[]", Step(value=[]), "[]"),
        ("print('a')\n1 + 1", Step(output="a\n", value=2), "a\n2"),
        ("print('a')\n'b'", Step(output="a\n", value="b", display="b"), "a\nb"),
        ("(1, 2)", Step(value=[1, 2], display="(1, 2)"), "(1, 2)"),
        ("x = 1", Step(), None),
    ],
)
def test_the_model_gets_everything(core_backend: Backend, code: str, step: Step, shown: Any) -> None:
    assert core_backend.make(step, output_fields=FIELDS).execute(code) == shown


def test_the_namespace_lasts_and_variables_are_set_anew(core_backend: Backend) -> None:
    interpreter = core_backend.make(Step(), Step(value=[1, 5]), Step(value=[5, 1]))
    interpreter.execute("kept = n + 1; n = 99", {"n": 0})
    assert interpreter.execute("[kept, n]", {"n": 5}) == [1, 5]
    assert interpreter.execute("[n, kept]") == [5, 1]


def test_submit_is_typed_by_the_output_fields(core_backend: Backend) -> None:
    submitted = {"answer": "a", "score": 3}
    fields = [{"name": "answer", "type": "str"}, {"name": "score", "type": "int"}]
    steps = [
        Step(submitted=submitted),
        Step(submitted=submitted),
        Step(error=TypeError("SUBMIT: score")),
        Step(submitted=submitted),
    ]
    interpreter = core_backend.make(*steps, output_fields=fields)
    assert interpreter.execute("SUBMIT('a', 3)") == FinalOutput(submitted)
    assert interpreter.execute("SUBMIT(score=3, answer='a')") == FinalOutput(submitted)
    with pytest.raises(CODE_ERROR, match="score"):
        interpreter.execute("SUBMIT('a')")
    code = "try:\n    SUBMIT('a', 3)\nexcept BaseException:\n    pass\nprint('never')"
    assert interpreter.execute(code) == FinalOutput(submitted)


def test_submit_without_output_fields_takes_one_value(core_backend: Backend) -> None:
    interpreter = core_backend.make(Step(submitted={"output": {"a": 1}}))
    assert interpreter.execute("SUBMIT({'a': 1})") == FinalOutput({"output": {"a": 1}})


def test_an_error_is_repairable_and_tells_all_that_was_printed(core_backend: Backend) -> None:
    interpreter = core_backend.make(Step(output="before\n", error=KeyError("k")), Step(value=1))
    with pytest.raises(CODE_ERROR) as caught:
        interpreter.execute("x = 1\nprint('before')\n{}['k']")
    assert "KeyError: 'k'" in str(caught.value)
    assert str(caught.value).endswith("Output before the error:\nbefore")
    assert interpreter.execute("x") == 1


@pytest.mark.parametrize("code", ["def f(:", "  x = 1\n y", "a\0b", "'\ud800' +"])
def test_invalid_source_is_a_syntax_error_and_the_session_lives(core_backend: Backend, code: str) -> None:
    interpreter = core_backend.make(Step(error=SyntaxError("invalid syntax")), Step(value=1))
    with pytest.raises(SyntaxError):
        interpreter.execute(code)
    assert interpreter.execute("1") == 1


def test_a_deadline_keeps_the_namespace(core_backend: Backend) -> None:
    interpreter = core_backend.make(
        Step(), Step(outcome=Outcome.TIMED_OUT, error=TimeoutError("0.3 s")), Step(value=7), execution_timeout_s=0.3
    )
    interpreter.execute("x = 7")
    with pytest.raises(CODE_ERROR, match="kept"):
        interpreter.execute("while True: pass")
    assert interpreter.execute("x") == 7


def test_a_dead_worker_ends_the_forward_with_its_reason(core_backend: Backend) -> None:
    interpreter = core_backend.make(Step(session_lost="exited(3)"))
    for _ in range(2):
        with pytest.raises(SessionLost) as caught:
            interpreter.execute("import os; os._exit(3)")
        assert caught.value.reason == "exited(3)"
        assert not isinstance(caught.value, CODE_ERROR)
        assert isinstance(caught.value, CodeInterpreterError) == HAS_CODE_EXECUTION_ERROR


def test_tools_added_replaced_and_removed_count_from_the_next_execute(core_backend: Backend) -> None:
    interpreter = core_backend.make(
        _calls("one"), _calls("one"), Step(error=NameError("name 'one' is not defined")), _calls("two")
    )
    interpreter.tools["one"] = lambda: 1
    assert interpreter.execute("one()") == 1
    interpreter.tools.update({"one": lambda: "uno", "two": lambda: 2})
    assert interpreter.execute("one()") == "uno"
    del interpreter.tools["one"]
    with pytest.raises(CODE_ERROR, match="one"):
        interpreter.execute("one()")
    assert interpreter.execute("two()") == 2


def test_arguments_reach_a_tool_as_its_signature_says(core_backend: Backend) -> None:
    def collect(first: Any, /, second: Any, *rest: Any, named: Any = "n", **more: Any) -> list[Any]:
        return [first, second, list(rest), named, more]

    code = "collect(1, 2, 3, named=4, kwargs=5, signature=6, inputs=7)"
    interpreter = core_backend.make(
        _calls("collect", 1, 2, 3, named=4, kwargs=5, signature=6, inputs=7), tools={"collect": collect}
    )
    assert interpreter.execute(code) == [1, 2, [3], 4, {"kwargs": 5, "signature": 6, "inputs": 7}]


def test_a_tools_error_is_an_exception_with_its_text_in_the_code(core_backend: Backend) -> None:
    def fail(how: str) -> None:
        raise {"value": ValueError, "key": KeyError}[how](f"[dspy bridge lm-error #1] {how}")

    def caught(execution: ScriptedExecution) -> Step:
        return Step(value="ValueError [dspy bridge lm-error #1] value")

    interpreter = core_backend.make(caught, _calls("fail", "value"), tools={"fail": fail})
    code = "try:\n    fail('value')\nexcept ValueError as error:\n    x = f'{type(error).__name__} {error}'\nx"
    assert interpreter.execute(code) == "ValueError [dspy bridge lm-error #1] value"
    with pytest.raises(CODE_ERROR, match=r"\[dspy bridge lm-error #1\] value"):
        interpreter.execute("fail('value')")


@pytest.mark.parametrize("value", [None, True, 3, 2**70, -0.5, math.inf, "s", "\ud800", [1, [2]], {"a": {"b": []}}])
def test_plain_values_go_both_ways(core_backend: Backend, value: Any) -> None:
    seen: list[Any] = []

    def same(given: Any) -> Any:
        seen.append(given)
        return given

    interpreter = core_backend.make(lambda e: Step(value=e.call("same", e.variables["v"])), tools={"same": same})
    assert interpreter.execute("same(v)", {"v": value}) == value
    assert seen == [value]


def test_nan_goes_both_ways(core_backend: Backend) -> None:
    interpreter = core_backend.make(lambda e: Step(value=e.variables["v"]))
    assert math.isnan(interpreter.execute("v", {"v": math.nan}))


class City(pydantic.BaseModel):
    name: str


def test_pydantic_parameters_and_results(core_backend: Backend) -> None:
    def shout(city: City) -> City:
        return City(name=city.name.upper())

    plain, wrapped = _calls("shout", {"name": "oslo"}), _calls("wrapped", city={"name": "rome"})
    interpreter = core_backend.make(plain, wrapped, tools={"shout": shout, "wrapped": dspy.Tool(shout)})
    assert interpreter.execute("shout({'name': 'oslo'})") == {"name": "OSLO"}
    assert interpreter.execute("wrapped(city={'name': 'rome'})") == {"name": "ROME"}


def test_dunder_names_are_tools_and_variables_like_others(core_backend: Backend) -> None:
    interpreter = core_backend.make(
        lambda e: Step(value=e.call("__dspy_call__", handle=e.variables["__dspy_host_token"])),
        tools={"__dspy_call__": lambda handle: handle * 2},
    )
    code = "globals()['__dspy_call__'](**{'handle': __dspy_host_token})"
    assert interpreter.execute(code, {"__dspy_host_token": "t"}) == "tt"
