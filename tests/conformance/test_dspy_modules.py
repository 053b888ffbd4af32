"""Claims about DSPy's own modules on this interpreter: RLM, Flex, CodeAct, ProgramOfThought, Evaluate."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from typing import Any

import dspy
import pydantic
import pytest
from dspy.primitives.code_interpreter import CodeInterpreterError
from dspy.utils import DummyLM

from host_client.errors import SessionLost
from host_client.scripted_broker import ScriptedExecution, Step
from tests.conformance import dspy_versions as versions
from tests.conformance.backends import Backend
from tests.conformance.dspy_versions import CallNotes, only_if, outputs_of, rlm, with_interpreter, writes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _shout(prompt: str) -> list[str]:
    """A sub-model."""
    return [prompt.upper()]


def _asks(tool: str, *args: Any, **kwargs: Any) -> Any:
    return lambda execution: Step(output=f"{execution.call(tool, *args, **kwargs)}\n")


class City(pydantic.BaseModel):
    name: str


# RLM.


def test_rlm_explores_asks_fails_recovers_and_submits(backend: Backend) -> None:
    steps = [
        Step(output="11\n"),
        _asks("llm_query", "what?"),
        _asks("llm_query_batched", ["a", "b"]),
        Step(error=NameError("name 'nope' is not defined")),
        Step(submitted={"answer": "whales", "count": 3}),
    ]
    codes = [
        "print(len(book))",
        "```python\nprint(llm_query('what?'))\n```",
        "found = llm_query_batched(['a', 'b']); print(found)",
        "nope",
        "SUBMIT('whales', len(found) + 1)",
    ]
    program = rlm("book -> answer: str, count: int", backend.factory(*steps), sub_lm=_shout)
    with dspy.context(lm=writes(*codes)):
        prediction = program(book="call me ish")
    assert (prediction.answer, prediction.count) == ("whales", 3)
    seen = outputs_of(prediction)
    assert seen[:3] == ["11", "WHAT?", "['A', 'B']"]
    assert seen[3].startswith("[Error]")
    assert "NameError: name 'nope' is not defined" in seen[3]


def test_rlm_shows_the_model_falsy_values_and_text_together_with_values(backend: Backend) -> None:
    steps = [Step(value=0), Step(output="a\n", value=[]), Step(submitted={"answer": "x"})]
    with dspy.context(lm=writes("0", "print('a')\n[]", "SUBMIT('x')")):
        prediction = rlm("q -> answer", backend.factory(*steps))(q="?")
    assert outputs_of(prediction)[:2] == ["0", "a\n[]"]


def test_rlm_uses_functions_tools_and_pydantic_parameters(backend: Backend) -> None:
    def greet(city: City, mark: str = "!") -> str:
        """Greet a city."""
        return f"hello {city.name}{mark}"

    def add(left: int, right: int) -> int:
        return left + right

    steps = [
        _asks("greet", {"name": "Oslo"}, "?"),
        _asks("plus", 1, 2),
        _asks("plus", left=1, right=3),
        Step(submitted={"answer": "x"}),
    ]
    codes = ["print(greet({'name': 'Oslo'}, '?'))", "print(plus(1, 2))", "print(plus(left=1, right=3))", "SUBMIT('x')"]
    program = rlm("q -> answer", backend.factory(*steps), tools=[greet, dspy.Tool(add, name="plus")])
    with dspy.context(lm=writes(*codes)):
        assert outputs_of(program(q="?"))[:3] == ["hello Oslo?", "3", "4"]


def test_rlm_aforward_runs_async_tools_off_the_event_loop(backend: Backend) -> None:
    threads: list[int] = []

    async def fetch(url: str) -> str:
        threads.append(threading.get_ident())
        await asyncio.sleep(0)
        return f"page {url}"

    program = rlm("q -> answer", backend.factory(_asks("fetch", "a"), Step(submitted={"answer": "x"})), tools=[fetch])
    with dspy.context(lm=writes("print(fetch('a'))", "SUBMIT('x')")):
        prediction = asyncio.run(program.acall(q="?"))
    assert outputs_of(prediction)[0] == "page a"
    assert threads
    assert threads[0] != threading.get_ident()


def test_rlm_tools_run_under_the_callers_dspy_context(backend: Backend) -> None:
    def budget() -> Any:
        return dspy.settings.get("my_budget")

    program = rlm("q -> answer", backend.factory(_asks("budget"), Step(submitted={"answer": "x"})), tools=[budget])
    with dspy.context(lm=writes("print(budget())", "SUBMIT('x')"), my_budget=7):
        assert outputs_of(program(q="?"))[0] == "7"


def test_rlm_falls_back_to_its_own_extraction_when_nothing_is_submitted(backend: Backend) -> None:
    lm = DummyLM([{"reasoning": "r", "code": "print('a')"}, {"answer": "extracted"}])
    with dspy.context(lm=lm):
        assert rlm("q -> answer", backend.factory(Step(output="a\n")), max_iters=1)(q="?").answer == "extracted"


def test_a_lost_session_ends_the_forward_instead_of_feeding_the_model(backend: Backend) -> None:
    program = rlm("q -> answer", backend.factory(Step(session_lost="exited(3)")))
    with dspy.context(lm=writes("import os; os._exit(3)", "SUBMIT('never')")), pytest.raises(SessionLost) as caught:
        program(q="?")
    assert caught.value.reason == "exited(3)"
    assert isinstance(caught.value, CodeInterpreterError) == versions.HAS_CODE_EXECUTION_ERROR


def test_a_wrong_input_ends_the_forward_before_anything_runs(backend: Backend) -> None:
    program = rlm("q -> answer", backend.factory())
    with dspy.context(lm=writes("print('never')")), pytest.raises(ValueError, match="variable q"):
        program(q={1: object})


def test_a_nested_rlm_works_inside_a_tool(backend: Backend) -> None:
    factory = backend.factory(
        _asks("delve", "deep"), Step(submitted={"answer": "inner"}), Step(submitted={"answer": "outer"})
    )

    def delve(question: str) -> str:
        with dspy.context(lm=writes(f"SUBMIT({'inner'!r})")):
            return str(rlm("q -> answer", factory)(q=question).answer)

    with dspy.context(lm=writes("print(delve('deep'))", "SUBMIT('outer')")):
        prediction = rlm("q -> answer", factory, tools=[delve])(q="?")
    assert (outputs_of(prediction)[0], prediction.answer) == ("inner", "outer")


def test_evaluate_with_eight_threads(backend: Backend) -> None:
    def double(execution: ScriptedExecution) -> Step:
        return Step(submitted={"answer": execution.call("double", execution.variables["n"])})

    class Program(dspy.Module):
        def forward(self, n: str) -> Any:
            program = rlm(signature, factory, tools=[dspy.Tool(lambda n: n * 2, name="double")])
            with dspy.context(lm=writes("SUBMIT(double(n))")):
                prediction = program(n=n)
            if not versions.HAS_FACTORY:
                program._interpreter.shutdown()
            return prediction

    # Parsed here: CPython 3.11's ast.parse, which DSPy uses for signatures, fails now and then in parallel threads
    # ("AST constructor recursion depth mismatch").
    signature = dspy.Signature("n -> answer")
    factory = backend.factory(script=itertools.repeat(double))
    examples = [dspy.Example(n=f"<{i}>", answer=f"<{i}><{i}>").with_inputs("n") for i in range(24)]
    evaluate = dspy.Evaluate(
        devset=examples,
        metric=lambda example, prediction, trace=None: example.answer == prediction.answer,
        num_threads=8,
        display_progress=False,
        provide_traceback=True,
    )
    result = evaluate(Program())
    assert float(getattr(result, "score", result)) == 100.0


@only_if(not versions.HAS_FACTORY, "DSPy 3.3 and later take factories instead")
def test_an_interpreter_of_the_users_serves_several_forwards_and_stays_the_users(backend: Backend) -> None:
    interpreter = backend.make(Step(submitted={"answer": "1"}), Step(submitted={"answer": "2"}), Step(value=3))
    program = dspy.RLM("q -> answer", interpreter=interpreter)
    with dspy.context(lm=writes("SUBMIT('1')", "SUBMIT('2')")):
        assert [program(q="?").answer, program(q="?").answer] == ["1", "2"]
    interpreter.output_fields = None
    assert interpreter.execute("3") == 3


@only_if(versions.HAS_POSITIONAL, "only DSPy 3.3 takes an interpreter by position")
def test_an_interpreter_given_by_position_stays_the_users(backend: Backend) -> None:
    interpreter = backend.make(Step(submitted={"answer": "1"}), Step(output="still here\n"))
    with dspy.context(lm=writes("SUBMIT('1')")):
        assert dspy.RLM("q -> answer")(interpreter, q="?").answer == "1"
    assert interpreter.execute("print('still here')") == "still here"


@only_if(versions.HAS_SETTING, "DSPy 3.4 and later have the setting")
def test_the_factory_can_be_a_setting_and_a_keyword_of_the_call(backend: Backend) -> None:
    first, second = Step(submitted={"answer": "setting"}), Step(submitted={"answer": "keyword"})
    program = dspy.RLM("q -> answer")
    with dspy.context(lm=writes("SUBMIT('setting')"), interpreter_factory=backend.factory(first)):
        assert program(q="?").answer == "setting"
    with dspy.context(lm=writes("SUBMIT('keyword')")):
        assert program(q="?", interpreter_factory=backend.factory(second)).answer == "keyword"


@only_if(versions.HAS_CALLBACKS, "DSPy 3.3.1 and later tell callbacks about interpreters")
def test_callbacks_hear_of_executions_and_tool_calls(backend: Backend) -> None:
    notes = CallNotes()
    interpreter = backend.make(
        lambda e: Step(value=e.call("add", 1, right=2)),
        Step(error=ZeroDivisionError("division by zero")),
        tools={"add": lambda left, right: left + right},
        callbacks=[notes],
    )
    interpreter.start()
    interpreter.execute("add(1, right=2)")
    with pytest.raises(Exception, match="division"):
        interpreter.execute("1/0")
    interpreter.shutdown()
    assert notes.notes == [
        "start",
        "execute add(1, right=2)",
        "tool add [1] {'right': 2}",
        "tool gave 3",
        "executed 3",
        "execute 1/0",
        "failed CodeExecutionError",
        "shutdown",
    ]


@only_if(not versions.HAS_CALLBACKS, "before DSPy 3.3.1, an interpreter would be reported as a module")
def test_older_versions_do_not_mistake_the_interpreter_for_a_module(backend: Backend) -> None:
    notes = CallNotes()
    with dspy.context(callbacks=[notes]):
        backend.make(Step(value=1), callbacks=[notes]).execute("1")
    assert notes.notes == []


@only_if(versions.HAS_SERIALIZABLE, "DSPy 3.3 and later have SandboxSerializable")
def test_sandbox_serializable_inputs(backend: Backend) -> None:
    from dspy.primitives.sandbox_serializable import SandboxSerializable

    class Numbers(SandboxSerializable):
        def __init__(self, payload: bytes) -> None:
            self.payload = payload

        def sandbox_setup(self) -> str:
            return "import struct"

        def to_sandbox(self) -> bytes:
            return self.payload

        def sandbox_assignment(self, var_name: str, data_expr: str) -> str:
            return f"{var_name} = len({data_expr}), struct.calcsize('i')"

        def rlm_preview(self, max_chars: int = 500) -> str:
            return "numbers"

    class Ask(dspy.Signature):
        text: Numbers = dspy.InputField()
        raw: Numbers = dspy.InputField()
        answer: str = dspy.OutputField()

    steps = [Step(), Step(), Step(output="(4, 4) (2, 4)\n"), Step(submitted={"answer": "x"})]
    with dspy.context(lm=writes("print(text, raw)", "SUBMIT('x')")):
        prediction = rlm(Ask, backend.factory(*steps))(text=Numbers("fünf".encode()), raw=Numbers(b"\xff\xfe"))
    assert outputs_of(prediction)[0] == "(4, 4) (2, 4)"


@only_if(versions.HAS_SUB_AGENTS, "DSPy 3.4.1 and later offer sub-agents in RLM")
class TestSubAgents:
    def test_a_predictor_built_in_the_sandbox_runs_on_the_host(
        self, real_backend: Backend, caplog: pytest.LogCaptureFixture
    ) -> None:
        code = "import dspy\nprint(dspy.Predict('question -> reply')(question='who?').reply)"
        program = rlm("q -> answer", real_backend.factory(), sub_lm=DummyLM([{"reply": "the sub-model"}]))
        with dspy.context(lm=writes(code, "SUBMIT('x')")):
            prediction = program(q="?")
        assert outputs_of(prediction)[0] == "the sub-model"
        assert "sub-agents are unavailable" not in caplog.text.lower()

    def test_a_recursive_sub_agent_has_a_repl_of_its_own(self, real_backend: Backend) -> None:
        code = "import dspy\nx = 'outer'\nprint(dspy.RLM('q -> answer')(q='deep').answer, x)"
        inner = writes("x = 'inner'", "SUBMIT(x)")
        with dspy.context(lm=writes(code, "SUBMIT('x')")):
            prediction = rlm("q -> answer", real_backend.factory(), sub_lm=inner)(q="?")
        assert outputs_of(prediction)[0] == "inner outer"

    def test_tools_can_be_handed_to_a_sub_agent(self, real_backend: Backend) -> None:
        def secret() -> str:
            """Tell the secret."""
            return "swordfish"

        code = "import dspy\nagent = dspy.ReAct('q -> answer', tools=[secret])\nprint(agent(q='?').answer)"
        sub_lm = DummyLM(
            [
                {"next_thought": "t", "next_tool_name": "secret", "next_tool_args": "{}"},
                {"next_thought": "t", "next_tool_name": "finish", "next_tool_args": "{}"},
                {"reasoning": "r", "answer": "swordfish"},
            ]
        )
        with dspy.context(lm=writes(code, "SUBMIT('x')")):
            prediction = rlm("q -> answer", real_backend.factory(), tools=[secret], sub_lm=sub_lm)(q="?")
        assert outputs_of(prediction)[0] == "swordfish"


# Flex.


@only_if(versions.HAS_FLEX, "DSPy 3.3 and later have Flex")
class TestFlex:
    SOURCE = (
        "class M(dspy.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.step = dspy.Predict('question -> draft')\n"
        "    def forward(self, question):\n"
        "        draft = self.step(question=question).draft\n"
        "        return dspy.Prediction(answer=shout(text=draft))\n"
    )

    def _flex(self, backend: Backend) -> Any:
        def shout(text: str) -> str:
            """Shout."""
            return text.upper()

        flex = dspy.Flex("question -> answer", tools=[shout], interpreter_factory=backend.factory())
        flex._bind_code(self.SOURCE)
        return flex

    def test_generated_modules_run_with_predictors_and_tools_on_the_host(self, real_backend: Backend) -> None:
        with dspy.context(lm=DummyLM([{"draft": "hello"}])):
            assert self._flex(real_backend)(question="?").answer == "HELLO"

    def test_a_models_failure_comes_out_as_itself(self, real_backend: Backend) -> None:
        class Broken(DummyLM):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                raise dspy.LMError("no credit")

            __call__ = forward

        with dspy.context(lm=Broken([])), pytest.raises(dspy.LMError, match="no credit"):
            self._flex(real_backend)(question="?")


# CodeAct and ProgramOfThought.


def factorial(n: int) -> int:
    """Factorial of n."""
    return 1 if n <= 1 else n * factorial(n - 1)


def test_code_act_runs_its_tools_source_in_the_sandbox_again_and_again(backend: Backend) -> None:
    forward = [Step(), Step(output="120\n")]
    act = with_interpreter(dspy.CodeAct, "n -> result", tools=[factorial], factory=backend.factory(*forward, *forward))
    for _ in range(2):
        lm = DummyLM(
            [
                {"generated_code": "```python\nprint(factorial(5))\n```", "finished": "True"},
                {"reasoning": "r", "result": "120"},
            ]
        )
        with dspy.context(lm=lm):
            prediction = act(n=5)
        assert prediction.trajectory["code_output_0"] == '"120"'


def test_program_of_thought_repairs_its_code_and_can_run_again(backend: Backend) -> None:
    forward = [Step(error=NameError("name 'nope' is not defined")), Step(value=2), Step(submitted={"output": {"a": 2}})]
    pot = with_interpreter(dspy.ProgramOfThought, "q -> answer", factory=backend.factory(*forward))
    repaired = [
        {"reasoning": "r", "generated_code": "```python\nnope\n```"},
        {"reasoning": "r", "generated_code": "```python\nx = 1 + 1\nx\n```"},
        {"reasoning": "r", "answer": "two"},
    ]
    submitted = [
        {"reasoning": "r", "generated_code": "```python\nSUBMIT({'a': 2})\n```"},
        {"reasoning": "r", "answer": "submitted"},
    ]
    with dspy.context(lm=DummyLM([*repaired, *submitted])):
        assert pot(q="1 + 1?").answer == "two"
        assert pot(q="1 + 1?").answer == "submitted"


def test_nothing_is_logged_about_unavailable_sub_agents(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with dspy.context(lm=writes("SUBMIT('x')")):
        rlm("q -> answer", backend.factory(Step(submitted={"answer": "x"})))(q="?")
    assert "unavailable" not in caplog.text
