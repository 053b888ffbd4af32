"""Claims about hooks around RLM's iterations; those named after a defect of dspy-rlm-hooks fail on it."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import importlib.util
import threading
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import dspy
import pytest
from dspy.primitives.code_interpreter import CodeInterpreterError
from dspy.utils import DummyLM

from host_client.errors import BadSetting, HookError, SessionLost
from host_client.hooks import (
    PostExecutionOutput,
    PostIterationOutput,
    PreExecutionOutput,
    PreIterationOutput,
    call_state,
    disable_rlm_hooks,
    enable_rlm_hooks,
)
from host_client.scripted_broker import Step
from tests.conformance import dspy_versions as versions
from tests.conformance.backends import Backend
from tests.conformance.dspy_versions import only_if, outputs_of, rlm, writes
from tests.conformance.hooked import Ask, Local, LocalFactory, both_ways

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def local() -> LocalFactory:
    return LocalFactory()


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return an RLM that takes an interpreter for each call, so that several may run at once."""
    if versions.HAS_FACTORY:
        return rlm("q -> answer", LocalFactory())
    monkeypatch.setattr("dspy.predict.rlm.PythonInterpreter", Local)  # what DSPy makes before 3.3
    return dspy.RLM("q -> answer")


class Notes:
    """Four hooks that note what they are called with and change nothing.

    Args:
        nothing: Whether they say so by returning None.
    """

    def __init__(self, *, nothing: bool = False) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self._nothing = nothing

    def hooks(self) -> dict[str, Any]:
        hooks = (self.pre_iteration, self.pre_execution, self.post_execution, self.post_iteration)
        return {f"{hook.__name__}_hook": hook for hook in hooks}

    def pre_iteration(self, iteration: int, variables: Any, history: Any, input_args: Any) -> Any:
        self.seen.append(("pre_iteration", iteration, len(history), input_args))
        return None if self._nothing else PreIterationOutput()

    def pre_execution(self, iteration: int, code: str, variables: Any, history: Any, input_args: Any) -> Any:
        self.seen.append(("pre_execution", iteration, code, input_args))
        return None if self._nothing else PreExecutionOutput(code=code)

    def post_execution(
        self, iteration: int, code: str, result: Any, variables: Any, history: Any, input_args: Any
    ) -> Any:
        self.seen.append(("post_execution", iteration, code, result, input_args))
        return None if self._nothing else PostExecutionOutput(result=result)

    def post_iteration(self, iteration: int, pred: Any, code: str, result: Any, history: Any) -> Any:
        self.seen.append(("post_iteration", iteration, pred.code, code, result, len(history)))
        return None if self._nothing else PostIterationOutput(history=history)


def later(output: Any) -> Any:
    """Return a hook that has to wait before it returns this."""

    async def hook(*arguments: Any) -> Any:
        await asyncio.sleep(0)
        return output(*arguments) if callable(output) else output

    return hook


# What the hooks see and change.


@both_ways
@pytest.mark.parametrize("nothing", [False, True], ids=["as-it-was", "defect-none"])
def test_hooks_run_in_order_and_may_return_nothing(ask: Ask, nothing: bool, local: LocalFactory) -> None:
    codes = ["```python\nprint(q)\n```", "nope", "SUBMIT('done')"]
    program, notes = rlm("q -> answer", local), Notes(nothing=nothing)
    with dspy.context(lm=writes(*codes)):
        without = ask(program, q="?")
    enable_rlm_hooks(program, **notes.hooks())
    with dspy.context(lm=writes(*codes)):
        prediction = ask(program, q="?")
    assert prediction.toDict() == without.toDict()
    error = outputs_of(prediction)[1]
    assert error.startswith("[Error]")
    assert notes.seen == [
        ("pre_iteration", 0, 0, {"q": "?"}),
        ("pre_execution", 0, "print(q)", {"q": "?"}),
        ("post_execution", 0, "print(q)", "?\n", {"q": "?"}),
        ("post_iteration", 0, codes[0], "print(q)", "?\n", 1),
        ("pre_iteration", 1, 1, {"q": "?"}),
        ("pre_execution", 1, "nope", {"q": "?"}),
        ("post_execution", 1, "nope", error, {"q": "?"}),
        ("post_iteration", 1, "nope", "nope", error, 2),
        ("pre_iteration", 2, 2, {"q": "?"}),
        ("pre_execution", 2, "SUBMIT('done')", {"q": "?"}),
        ("post_execution", 2, "SUBMIT('done')", notes.seen[-1][3], {"q": "?"}),
    ]


@both_ways
@pytest.mark.parametrize("wrapped", [lambda output: output, later], ids=["plain", "async"])
def test_each_hook_changes_what_it_is_for(ask: Ask, wrapped: Any, local: LocalFactory) -> None:
    def add(iteration: int, variables: Any, history: Any, input_args: Any) -> PreIterationOutput:
        return PreIterationOutput(extra_vars={"n": iteration}, python_code="def twice(x): return 2 * x")

    program = rlm("q -> answer", local)
    enable_rlm_hooks(
        program,
        pre_iteration_hook=wrapped(add),
        pre_execution_hook=wrapped(lambda i, code, *rest: PreExecutionOutput(code.replace("BAD", "twice"))),
        post_execution_hook=wrapped(
            lambda i, code, result, *rest: PostExecutionOutput(f"<{result}>") if isinstance(result, str) else None
        ),
        post_iteration_hook=wrapped(
            lambda i, pred, code, result, history: PostIterationOutput(
                history.append(reasoning="a hook's", code="", output=pred.reasoning)
            )
        ),
    )
    with dspy.context(lm=writes("print(BAD(n), end='')", "SUBMIT(BAD(str(n)))")):
        prediction = ask(program, q="?")
    assert prediction.answer == "11"
    assert outputs_of(prediction)[:2] == ["<0>", "step 1"]
    assert [step["code"] for step in prediction.trajectory] == ["print(twice(n), end='')", "", "SUBMIT(twice(str(n)))"]


@both_ways
def test_the_last_hook_can_stop_the_run_and_the_answer_is_extracted(ask: Ask, local: LocalFactory) -> None:
    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, post_iteration_hook=lambda *arguments: PostIterationOutput(stop=True))
    with dspy.context(lm=DummyLM([{"reasoning": "r", "code": "print(1)"}, {"answer": "extracted"}])):
        prediction = ask(program, q="?")
    assert prediction.answer == "extracted"
    assert outputs_of(prediction) == ["1\n"]


@both_ways
def test_a_submission_can_be_turned_down(ask: Ask, local: LocalFactory) -> None:
    def more(i: int, code: str, result: Any, *rest: Any) -> PostExecutionOutput:
        return PostExecutionOutput("[Error] look again" if i == 0 else result)

    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, post_execution_hook=more)
    with dspy.context(lm=writes("SUBMIT('early')", "SUBMIT('late')")):
        prediction = ask(program, q="?")
    assert (prediction.answer, outputs_of(prediction)[0]) == ("late", "[Error] look again")


@both_ways
def test_the_last_hook_sees_a_submission_if_it_wants_to(ask: Ask, local: LocalFactory) -> None:
    seen: list[Any] = []
    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, post_iteration_hook=lambda *a: seen.append([e.code for e in a[4]]), final=True)
    with dspy.context(lm=writes("1", "SUBMIT('x')")):
        assert ask(program, q="?").answer == "x"
    assert seen == [["1"], ["1", "SUBMIT('x')"]]


@both_ways
def test_prompt_context_is_shown_to_the_model_and_nothing_else_is(ask: Ask, local: LocalFactory) -> None:
    program, lm = rlm("q -> answer", local), writes("1", "SUBMIT('x')")
    hook = lambda i, *rest: PreIterationOutput({"hidden_name": 1}, prompt_context="mind the gap" if i == 0 else "")  # noqa: E731
    enable_rlm_hooks(program, pre_iteration_hook=hook)
    with dspy.context(lm=lm):
        ask(program, q="?")
    first, second = (str(entry["messages"]) for entry in lm.history)
    assert "mind the gap" in first
    assert "mind the gap" not in second
    assert "hidden_name" not in first


def test_what_a_hook_does_to_its_arguments_stays_with_it(local: LocalFactory) -> None:
    def spoil(iteration: int, variables: Any, history: Any, input_args: Any) -> None:
        input_args["q"] = "spoiled"
        variables.clear()

    program, inputs = rlm("q -> answer", local), {"q": "?"}
    enable_rlm_hooks(program, pre_iteration_hook=spoil)
    with dspy.context(lm=writes("print(q)", "SUBMIT(q)")):
        assert program(**inputs).answer == "?"


# The defects.


@only_if(versions.HAS_SETTING, "DSPy 3.4 and later tell the model about the factory of this very call")
@both_ways
def test_defect_the_signature_of_the_call_is_lost(ask: Ask, local: LocalFactory) -> None:
    local.execution_instructions = "a very special machine"  # type: ignore[attr-defined]
    program, lm = rlm("q -> answer", LocalFactory()), writes("SUBMIT('x')")
    enable_rlm_hooks(program, **Notes().hooks())
    with dspy.context(lm=lm):
        ask(program, q="?", interpreter_factory=local)
    assert "a very special machine" in str(lm.history[0]["messages"])
    assert len(local.made) == 1


@both_ways
@pytest.mark.parametrize("hooks", ["all", "none"])
def test_defect_terminal_errors_become_text_for_the_model(ask: Ask, hooks: str, backend: Backend) -> None:
    program = rlm("q -> answer", backend.factory(Step(session_lost="exited(3)")))
    enable_rlm_hooks(program, **(Notes().hooks() if hooks == "all" else {}))
    with dspy.context(lm=writes("import os; os._exit(3)", "SUBMIT('never')")), pytest.raises(SessionLost) as caught:
        ask(program, q="?")
    assert caught.value.reason == "exited(3)"
    assert isinstance(caught.value, CodeInterpreterError) == versions.HAS_CODE_EXECUTION_ERROR


def test_a_session_lost_in_the_code_of_a_hook_is_terminal_too(backend: Backend) -> None:
    program = rlm("q -> answer", backend.factory(Step(session_lost="exited(3)")))
    enable_rlm_hooks(program, pre_iteration_hook=lambda *a: PreIterationOutput(python_code="import os; os._exit(3)"))
    with dspy.context(lm=writes("SUBMIT('never')")), pytest.raises(SessionLost):
        program(q="?")


@both_ways
def test_defect_python_code_runs_with_every_cell_and_shifts_its_lines(ask: Ask, local: LocalFactory) -> None:
    setup = "import math\n\ndef area(r):\n    return math.pi * r * r\n"
    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, pre_iteration_hook=lambda *arguments: PreIterationOutput(python_code=setup))
    with dspy.context(lm=writes("area = 3", "print(area)\n1/0", "SUBMIT('x')")):
        prediction = ask(program, q="?")
    assert local.codes == [setup, "area = 3", "print(area)\n1/0", "SUBMIT('x')"]
    assert "(line 2)" in outputs_of(prediction)[1]
    assert [step["code"] for step in prediction.trajectory] == local.codes[1:]


def test_python_code_that_changes_runs_again(local: LocalFactory) -> None:
    setups = ["mode = 'a'", "mode = 'b'", "", "mode = 'b'", "mode = 'a'"]
    program = rlm("q -> answer", local)
    enable_rlm_hooks(
        program,
        pre_iteration_hook=lambda i, *rest: PreIterationOutput(python_code=setups[i], persistent_python_code="k = 1"),
    )
    with dspy.context(lm=writes("1", "2", "3", "4", "SUBMIT(mode)")):
        assert program(q="?").answer == "a"
    assert local.codes == ["k = 1", setups[0], "1", setups[1], "2", "3", "4", setups[4], "SUBMIT(mode)"]


@only_if(not versions.HAS_FACTORY, "before DSPy 3.3, one interpreter serves several calls")
def test_defect_python_code_leaks_into_later_calls_of_an_interpreter(local: LocalFactory) -> None:
    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, pre_iteration_hook=lambda *arguments: PreIterationOutput(python_code="k = 1"))
    with dspy.context(lm=writes("1", "SUBMIT('x')", "2", "SUBMIT('x')", "3", "SUBMIT('x')")):
        program(q="?")
        program(q="?")
        disable_rlm_hooks(program)
        program(q="?")
    assert [local.codes.count(code) for code in ("k = 1", "3")] == [2, 1]
    assert not any("k = 1" in code for code in local.codes if code != "k = 1")


@only_if(hasattr(dspy.RLM, "_execute_code"), "DSPy 3.1 ends the call where the model writes another language")
@both_ways
def test_defect_a_fence_of_another_language_passes_the_last_hook_by(ask: Ask, local: LocalFactory) -> None:
    program, notes = rlm("q -> answer", local), Notes()
    enable_rlm_hooks(program, **notes.hooks())
    with dspy.context(lm=writes("```bash\nls\n```", "SUBMIT('x')")):
        prediction = ask(program, q="?")
    [entry] = [note for note in notes.seen if note[0] == "post_iteration"]
    assert entry[:4] == ("post_iteration", 0, "```bash\nls\n```", "```bash\nls\n```")
    assert entry[4] == outputs_of(prediction)[0]
    assert [note[0] for note in notes.seen[:2]] == ["pre_iteration", "post_iteration"]  # nothing was executed


class _Awaitable:
    """Neither a coroutine nor a future, but it can be awaited."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        return self._output


@both_ways
def test_defect_only_coroutines_are_awaited(ask: Ask, local: LocalFactory) -> None:
    program = rlm("q -> answer", local)
    enable_rlm_hooks(
        program, pre_execution_hook=lambda *arguments: _Awaitable(PreExecutionOutput(code="SUBMIT('hook')"))
    )
    with dspy.context(lm=writes("SUBMIT('model')")):
        assert ask(program, q="?").answer == "hook"


def test_a_future_and_the_running_task_are_the_callers_own_under_acall(local: LocalFactory) -> None:
    tasks: list[Any] = []

    def hook(*arguments: Any) -> Any:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, PreExecutionOutput(code="SUBMIT('hook')"))
        tasks.append(asyncio.current_task())
        return future

    async def main() -> Any:
        tasks.append(asyncio.current_task())
        return await program.acall(q="?")

    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, pre_execution_hook=hook)
    with dspy.context(lm=writes("SUBMIT('model')")):
        assert asyncio.run(main()).answer == "hook"
    assert tasks[0] is tasks[1]


def test_defect_an_async_hook_fails_in_a_plain_call_under_a_running_loop(local: LocalFactory) -> None:
    flavour = contextvars.ContextVar("flavour", default="none")

    async def hook(*arguments: Any) -> PreExecutionOutput:
        await asyncio.sleep(0)
        return PreExecutionOutput(code=f"SUBMIT({flavour.get()!r})")

    async def main() -> Any:
        flavour.set("salt")
        return program(q="?")

    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, pre_execution_hook=hook)
    with dspy.context(lm=writes("SUBMIT('model')")):
        assert asyncio.run(main()).answer == "salt"


def test_defect_turning_off_twice_or_what_was_never_on_fails(local: LocalFactory) -> None:
    program, notes = rlm("q -> answer", local), Notes()
    before = dict(program.__dict__)
    disable_rlm_hooks(program)
    enable_rlm_hooks(program, **notes.hooks())
    enable_rlm_hooks(program, **notes.hooks())
    disable_rlm_hooks(program)
    disable_rlm_hooks(program)
    assert type(program) is dspy.RLM
    assert program.__dict__ == before
    with dspy.context(lm=writes("SUBMIT('x')")):
        assert program(q="?").answer == "x"
    assert notes.seen == []


@both_ways
@pytest.mark.parametrize("name", ["pre_iteration", "pre_execution", "post_execution", "post_iteration"])
def test_a_hook_may_turn_the_hooks_off(ask: Ask, name: str, local: LocalFactory) -> None:
    def off(*arguments: Any) -> Any:
        disable_rlm_hooks(program)
        return getattr(notes, name)(*arguments)

    program, notes = rlm("q -> answer", local), Notes()
    enable_rlm_hooks(program, **{**notes.hooks(), f"{name}_hook": off})
    with dspy.context(lm=writes("print(1)", "print(2)", "SUBMIT('x')")):
        prediction = ask(program, q="?")
    assert (prediction.answer, outputs_of(prediction)[:2]) == ("x", ["1\n", "2\n"])
    assert {note[1] for note in notes.seen} == {0}  # none after that iteration
    assert type(program) is dspy.RLM


def test_defect_turning_on_another_hook_forgets_the_first(local: LocalFactory) -> None:
    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, pre_execution_hook=lambda *a: PreExecutionOutput(code="print('hook')"))
    enable_rlm_hooks(program, post_iteration_hook=lambda *a: PostIterationOutput(history=a[4], stop=True))
    with dspy.context(lm=DummyLM([{"reasoning": "r", "code": "print(1)"}, {"answer": "extracted"}])):
        assert outputs_of(program(q="?")) == ["hook\n"]


def test_defect_calls_in_other_threads_change_the_hooks_of_a_call(shared: Any) -> None:
    both_run = threading.Barrier(2, timeout=30)
    answers: dict[str, str] = {}

    def wait(iteration: int, *rest: Any) -> PreIterationOutput:
        if iteration == 0:
            both_run.wait()
        return PreIterationOutput()

    def call(name: str) -> None:
        with dspy.context(lm=writes("1", "SUBMIT('model')")):
            answers[name] = shared(q="?").answer

    def named(name: str) -> Any:
        return lambda i, code, *rest: PreExecutionOutput(code=code.replace("model", name))

    threads = []
    for name in ("one", "two"):
        begun = threading.Event()
        enable_rlm_hooks(shared, pre_execution_hook=named(name), pre_iteration_hook=_begun(wait, begun))
        threads.append(threading.Thread(target=contextvars.copy_context().run, args=(call, name)))
        threads[-1].start()
        assert begun.wait(30)
    for thread in threads:
        thread.join(30)
    assert answers == {"one": "one", "two": "two"}


def _begun(hook: Any, event: threading.Event) -> Any:
    def noting(*arguments: Any) -> Any:
        event.set()
        return hook(*arguments)

    return noting


@both_ways
def test_each_call_has_a_state_of_its_own(ask: Ask, shared: Any) -> None:
    def count(*arguments: Any) -> PostIterationOutput:
        state = call_state()
        state["steps"] = state.get("steps", 0) + 1
        return PostIterationOutput(stop=state["steps"] == 2)

    def run(name: str) -> int:
        lm = DummyLM([{"reasoning": "r", "code": "1"}, {"reasoning": "r", "code": "2"}, {"answer": name}])
        with dspy.context(lm=lm):
            return len(ask(shared, q="?").trajectory)

    enable_rlm_hooks(shared, post_iteration_hook=count)
    lengths: list[int] = []
    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(lambda: lengths.append(run("x")),))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert lengths == [2, 2, 2, 2]


def test_async_calls_at_the_same_time_have_states_of_their_own(shared: Any) -> None:
    async def count(*arguments: Any) -> PostIterationOutput:
        state = call_state()
        state["steps"] = state.get("steps", 0) + 1
        await asyncio.sleep(0)
        return PostIterationOutput(stop=state["steps"] == 2)

    async def one() -> int:
        lm = DummyLM([{"reasoning": "r", "code": "1"}, {"reasoning": "r", "code": "2"}, {"answer": "x"}])
        with dspy.context(lm=lm):
            return len((await shared.acall(q="?")).trajectory)

    async def main() -> list[int]:
        return list(await asyncio.gather(*(one() for _ in range(4))))

    enable_rlm_hooks(shared, post_iteration_hook=count)
    assert asyncio.run(main()) == [2, 2, 2, 2]


def test_host_tools_of_a_call_share_its_state(backend: Backend) -> None:
    def note(text: str) -> str:
        call_state()["noted"] = text
        return "ok"

    steps = [lambda execution: Step(output=f"{execution.call('note', 'gold')}\n"), Step(submitted={"answer": "x"})]
    program = rlm("q -> answer", backend.factory(*steps), tools=[note])
    enable_rlm_hooks(program, post_iteration_hook=lambda *a: seen.append(call_state()["noted"]))
    seen: list[str] = []
    with dspy.context(lm=writes("print(note('gold'))", "SUBMIT('x')")):
        program(q="?")
    assert seen == ["gold"]


def test_state_is_asked_for_in_vain_outside_of_a_call() -> None:
    with pytest.raises(HookError, match="no RLM with hooks"):
        call_state()


def test_an_rlm_with_hooks_can_run_inside_its_own_hooks(shared: Any) -> None:
    depth: list[str] = []

    def delve(iteration: int, *rest: Any) -> PreIterationOutput | None:
        depth.append(f"{call_state().setdefault('name', len(depth))}.{iteration}")
        if depth != ["0.0"]:
            return None
        with dspy.context(lm=writes("1", "SUBMIT('inner')")):
            return PreIterationOutput(extra_vars={"found": shared(q="?").answer})

    enable_rlm_hooks(shared, pre_iteration_hook=delve)
    with dspy.context(lm=writes("print(found)", "SUBMIT(found)")):
        assert shared(q="?").answer == "inner"
    assert depth == ["0.0", "1.0", "1.1", "0.1"]


# Subclasses, copies, optimizers, files.


class Own(dspy.RLM):  # type: ignore[misc]
    """An RLM of a user's, with methods of its own where the hooks are."""

    def _execute_iteration(self, *args: Any, **kwargs: Any) -> Any:
        self.rounds = getattr(self, "rounds", 0) + 1
        outcome = super()._execute_iteration(*args, **kwargs)
        self.last = type(outcome).__name__
        return outcome


def test_defect_methods_of_a_subclass_are_not_called(local: LocalFactory) -> None:
    keyword = {"interpreter_factory": local} if versions.HAS_FACTORY else {"interpreter": local()}
    program, notes = Own("q -> answer", **keyword), Notes()
    enable_rlm_hooks(program, **notes.hooks())
    with dspy.context(lm=writes("1", "SUBMIT('x')")):
        assert program(q="?").answer == "x"
    assert (program.rounds, program.last, len(notes.seen)) == (2, "Prediction", 7)
    assert isinstance(program, Own)
    disable_rlm_hooks(program)
    assert type(program) is Own


class Odd(dspy.RLM):  # type: ignore[misc]
    """Runs code in a way that no hook can know of."""

    def _execute_iteration(self, repl: Any, variables: Any, history: Any, *rest: Any) -> Any:
        action = self.generate_action(variables_info=[], repl_history=history, iteration="1")
        code = [action.code] if hasattr(dspy.RLM, "_execute_code") else []
        return self._process_execution_result(action, *code, "ran", history, ["answer"])


@pytest.mark.parametrize("name", ["pre_execution_hook", "post_execution_hook"])
def test_a_hook_that_would_be_left_out_in_silence_ends_the_call(name: str, local: LocalFactory) -> None:
    keyword = {"interpreter_factory": local} if versions.HAS_FACTORY else {"interpreter": local()}
    program = Odd("q -> answer", **keyword)
    enable_rlm_hooks(program, **{name: lambda *arguments: None})
    with dspy.context(lm=writes("1", "2")), pytest.raises(HookError, match="Odd runs code in a way of its own"):
        program(q="?")


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda p: p.deepcopy(), lambda p: p.reset_copy()])
def test_copies_have_the_hooks_and_are_their_own(copied: Any, local: LocalFactory) -> None:
    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, pre_execution_hook=lambda i, code, *rest: PreExecutionOutput(code.replace("a", "b")))
    twin = copied(program)
    disable_rlm_hooks(program)
    with dspy.context(lm=writes("SUBMIT('a')")):
        assert program(q="?").answer == "a"
    with dspy.context(lm=writes("SUBMIT('a')")):
        assert twin(q="?").answer == "b"


def _shout(iteration: int, code: str, variables: Any, history: Any, input_args: Any) -> PreExecutionOutput:
    return PreExecutionOutput(code.upper())


def test_hooks_survive_pickle_and_are_no_part_of_a_saved_state(tmp_path: Path) -> None:
    program = dspy.RLM("q -> answer")
    plain = program.dump_state()
    enable_rlm_hooks(program, pre_execution_hook=_shout)
    assert program.dump_state() == plain
    program.save(tmp_path / "state.json")
    program.load(tmp_path / "state.json")
    program.save(tmp_path / "whole", save_program=True)
    for twin in (cloudpickle.loads(cloudpickle.dumps(program)), _load(tmp_path / "whole")):
        assert type(twin) is type(program)
        disable_rlm_hooks(twin)
        assert type(twin) is dspy.RLM
        assert [name for name, _ in twin.named_predictors()] == ["generate_action", "extract"]


def _load(path: Path) -> Any:
    import inspect

    allow = {"allow_pickle": True} if "allow_pickle" in inspect.signature(dspy.load).parameters else {}
    return dspy.load(path, **allow)


def test_an_optimizer_finds_the_predictors_and_its_copy_has_the_hooks(local: LocalFactory) -> None:
    program, notes = rlm("q -> answer", local), Notes()
    enable_rlm_hooks(program, **notes.hooks())
    optimizer = dspy.BootstrapFewShot(metric=lambda *a: True, max_bootstrapped_demos=1, max_rounds=1)
    with dspy.context(lm=writes("SUBMIT('x')", "SUBMIT('y')")):
        compiled = optimizer.compile(program, trainset=[dspy.Example(q="?", answer="x").with_inputs("q")])
        notes.seen.clear()
        assert compiled(q="?").answer == "y"
    assert [demo.code for demo in compiled.generate_action.demos] == ["SUBMIT('x')"]
    assert len(notes.seen) == 3


# Hooks that do wrong.

WRONG = [
    ("pre_iteration_hook", lambda: "text", r"pre_iteration_hook returned str 'text'; expected PreIterationOutput\("),
    ("pre_execution_hook", lambda: 3, r"pre_execution_hook returned int 3; expected PreExecutionOutput\(...\) or None"),
    ("post_execution_hook", lambda: PreExecutionOutput("x"), "returned PreExecutionOutput .* expected PostExecution"),
    ("post_iteration_hook", lambda: True, "post_iteration_hook returned bool True; expected PostIterationOutput"),
    ("pre_iteration_hook", lambda: PreIterationOutput({"a b": 1}), "extra_vars=dict .* Python names"),
    ("pre_iteration_hook", lambda: PreIterationOutput(python_code=b"x"), "python_code=bytes b'x'; expected a str"),
    ("pre_execution_hook", lambda: PreExecutionOutput(None), "code=NoneType None; expected a str"),
    ("post_iteration_hook", lambda: PostIterationOutput([]), "history=list .* expected a REPLHistory or None"),
    ("post_iteration_hook", lambda: PostIterationOutput(stop=1), "stop=int 1; expected True or False"),
]


@both_ways
@pytest.mark.parametrize(("name", "returned", "message"), WRONG)
def test_a_wrong_return_is_an_error_that_names_the_hook(
    ask: Ask, name: str, returned: Any, message: str, local: LocalFactory
) -> None:
    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, **{name: lambda *arguments: returned()})
    with dspy.context(lm=writes("print(1)", "SUBMIT('never')")), pytest.raises(HookError, match=message):
        ask(program, q="?")


@both_ways
@pytest.mark.parametrize(
    "name", ["pre_iteration_hook", "pre_execution_hook", "post_execution_hook", "post_iteration_hook"]
)
@pytest.mark.parametrize("error", [KeyError("mine"), SyntaxError("mine"), CodeInterpreterError("mine")])
def test_what_a_hook_raises_ends_the_call_as_it_is(ask: Ask, name: str, error: Exception, local: LocalFactory) -> None:
    def broken(*arguments: Any) -> None:
        raise error

    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, **{name: broken})
    with dspy.context(lm=writes("print(1)", "SUBMIT('never')")), pytest.raises(type(error), match="mine") as caught:
        ask(program, q="?")
    assert caught.value is error
    assert f"raised by {name} in iteration 0" in caught.value.__notes__


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("1/0", "python_code that fails in the sandbox: ZeroDivisionError"),
        ("def", "python_code that fails"),
        ("SUBMIT('x')", "SUBMIT"),
    ],
)
def test_python_code_that_fails_is_the_hooks_fault(setup: str, message: str, local: LocalFactory) -> None:
    program = rlm("q -> answer", local)
    enable_rlm_hooks(program, pre_iteration_hook=lambda *arguments: PreIterationOutput(python_code=setup))
    with dspy.context(lm=writes("SUBMIT('never')")), pytest.raises(HookError, match=message):
        program(q="?")


@pytest.mark.parametrize(
    ("name", "hook", "message"),
    [
        ("pre_iteration_hook", "text", "pre_iteration_hook is str 'text'; expected a function of"),
        ("post_iteration_hook", lambda history: None, "post_iteration_hook takes .* called with .iteration, pred"),
    ],
)
def test_a_hook_that_cannot_be_called_is_refused_at_once(
    name: str, hook: Any, message: str, local: LocalFactory
) -> None:
    program = rlm("q -> answer", local)
    with pytest.raises(BadSetting, match=message):
        enable_rlm_hooks(program, **{name: hook})
    assert type(program) is dspy.RLM


def test_what_is_no_rlm_is_refused() -> None:
    with pytest.raises(BadSetting, match="Predict is no dspy"):
        enable_rlm_hooks(dspy.Predict("q -> answer"))


# On the sandbox itself.


def _example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "hooks_example.py"
    spec = importlib.util.spec_from_file_location("hooks_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@both_ways
@pytest.mark.parametrize("wrapped", [lambda hook: hook, later], ids=["plain", "async"])
def test_the_four_hooks_of_the_page_around_real_code(ask: Ask, wrapped: Any, real_backend: Backend) -> None:
    page = _example()
    program = rlm("source, question -> markers: list[str]", real_backend.factory())
    enable_rlm_hooks(
        program,
        pre_iteration_hook=wrapped(page.pre_iteration),
        pre_execution_hook=wrapped(page.pre_execution),
        post_execution_hook=wrapped(page.post_execution),
        post_iteration_hook=wrapped(page.make_budget_hook(0.03)),
    )
    codes = ["print(eval('1'))", "print(*grep(search_pattern, source))", "SUBMIT('never')"]
    lm = DummyLM([*({"reasoning": "r", "code": code} for code in codes[:2]), {"markers": '["TODO"]'}])
    with dspy.context(lm=lm):
        prediction = ask(program, source=page.SOURCE, question="?")
    blocked, found = prediction.trajectory
    assert blocked["code"] == "print(# BLOCKED('1'))"
    assert blocked["output"].startswith("[Error]")
    assert blocked["output"].endswith("is already in scope.")
    assert found["output"] == "TODO HACK FIXME"
    assert prediction.markers == ["TODO"]
