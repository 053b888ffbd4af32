"""One call of an RLM and one iteration of it, as its hooks see them. Nothing here outlives the call.

Everything is written once, as coroutines. Under ``acall`` they are awaited, and so are hooks, on the caller's own event
loop. Under a plain call they are driven to their end at once: an awaitable that a hook returns is then finished
elsewhere, so that the coroutine never has to wait.
"""

from __future__ import annotations

import contextvars
import dataclasses
import inspect
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from host_client.dspy_compat import contract
from host_client.errors import HookError
from host_client.hooks.outputs import (
    PostExecutionHook,
    PostIterationHook,
    PreExecutionHook,
    PreIterationHook,
    checked,
)
from host_client.tool_runner import await_result

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Hooks:
    """The hooks of an RLM; never changed, so that a call keeps those that it began with.

    Attributes:
        final: Whether ``post_iteration_hook`` is also called when the answer was submitted.
    """

    pre_iteration_hook: PreIterationHook | None = None
    pre_execution_hook: PreExecutionHook | None = None
    post_execution_hook: PostExecutionHook | None = None
    post_iteration_hook: PostIterationHook | None = None
    final: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        return self  # copies of an RLM share its hooks: they may hold what cannot be copied


@dataclasses.dataclass(eq=False)
class Call:
    """One call of an RLM.

    Attributes:
        rlm: Whose call it is.
        hooks: Its hooks when it began.
        state: What ``call_state`` gives.
        setups: By field of ``PreIterationOutput``, the code that ran last.
        iteration: The one that runs now.
    """

    rlm: Any
    hooks: Hooks
    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    setups: dict[str, str] = dataclasses.field(default_factory=dict)
    iteration: Iteration | None = None


# A thread or task sees its own call, a tool's thread that of the code that called it.
_current: contextvars.ContextVar[Call | None] = contextvars.ContextVar("rlm_hooks_call", default=None)


@contextmanager
def running(call: Call) -> Iterator[Call]:
    """Let ``current`` find this call."""
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)


def current(rlm: Any) -> Call | None:
    """Return the call of this RLM that runs here, or None."""
    call = _current.get()
    return call if call is not None and call.rlm is rlm else None


def call_state() -> dict[str, Any]:
    """Return a dict for the hooks (and host tools) of the running call: new for each call, shared with no other.

        def budget(iteration, pred, code, result, history):
            state = call_state()
            state["steps"] = state.get("steps", 0) + 1
            return PostIterationOutput(history, stop=state["steps"] >= 5)

    Raises:
        HookError: No RLM with hooks is running here.
    """
    call = _current.get()
    if call is None:
        raise HookError("call_state() was asked for where no RLM with hooks is running")
    return call.state


class _Shown:
    """A text where DSPy expects a variable to describe."""

    def __init__(self, text: str) -> None:
        self._text = text

    def format(self) -> str:
        return self._text


class Later:
    """Stands for the result of code that runs after DSPy's ``_aexecute_iteration``: there, hooks can be awaited.

    Attributes:
        record: Has DSPy process the result; set when DSPy would have done so.
    """

    def __init__(self, code: str, execute: Callable[[str], Any]) -> None:
        self._code, self._execute = code, execute
        self.record: Callable[[Any], Any] | None = None

    async def finish(self, iteration: Iteration) -> Any:
        """Run the code between its hooks; return DSPy's outcome."""
        result = await iteration.run(self._code, self._execute)
        assert self.record is not None
        return self.record(result)


class Iteration:
    """One iteration; made by the wrapper around DSPy's and found by the wrappers inside it.

    Args:
        call: Whose iteration.
        given: What DSPy's method was called with.
        awaits: Whether hooks can be awaited where this runs.

    Attributes:
        pred: What the model said.
        code: What ran or, where nothing could run, what the model wrote.
        result: What came of it.
        rewritten: Whether ``code`` is a hook's.
        ran: Whether code was run at all.
        later: What DSPy was given instead of a result, under ``acall``.
        error: What DSPy 3.1 must not turn into text.
    """

    def __init__(self, call: Call, given: Mapping[str, Any], *, awaits: bool) -> None:
        self._call = call
        self._repl, self._number = given["repl"], given["iteration"]
        self._variables, self._history = given["variables"], given["history"]
        self._input_args, self._output_fields = given["input_args"], given["output_field_names"]
        self.awaits = awaits
        self.pred: Any = None
        self.code = ""
        self.result: Any = None
        self.rewritten = self.ran = False
        self.later: Later | None = None
        self.error: Exception | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let DSPy's own methods find this iteration."""
        self._call.iteration = self
        try:
            yield
        finally:
            self._call.iteration = None

    def for_extraction(self, history: Any) -> tuple[Any, Any, Any]:
        """Return the arguments of DSPy's ``_extract_fallback``."""
        return self._variables, history, self._output_fields

    async def begin(self) -> tuple[list[Any], dict[str, Any]]:
        """Run the first hook; return the variables and input arguments to give to DSPy."""
        output = await self._ask("pre_iteration_hook", list(self._variables), self._history, dict(self._input_args))
        shown = list(self._variables)
        if output is not None:
            self._input_args = {**self._input_args, **output.extra_vars}
            for field in ("persistent_python_code", "python_code"):
                self._set_up(field, getattr(output, field))
            if output.prompt_context:
                shown.append(_Shown(output.prompt_context))
        return shown, dict(self._input_args)

    async def run(self, code: str, execute: Callable[[str], Any]) -> Any:
        """Run code between the second and the third hook; return its result."""
        self.code, self.ran = code, True
        rest = list(self._variables), self._history
        if (rewrite := await self._ask("pre_execution_hook", code, *rest, dict(self._input_args))) is not None:
            self.code, self.rewritten = rewrite.code, rewrite.code != code
        self.result = execute(self.code)
        arguments = (self.code, self.result, *rest, dict(self._input_args))
        if (seen := await self._ask("post_execution_hook", *arguments)) is not None:
            self.result = seen.result
        return self.result

    def did_not_run(self, code: str, result: Any) -> None:
        """Take note of code that no hook saw.

        Raises:
            HookError: It did run, in a way that hooks do not know, and should have been shown to one.
        """
        hooks = self._call.hooks
        fence_of_another_language = isinstance(result, str) and result.startswith("[Error]")
        if (hooks.pre_execution_hook or hooks.post_execution_hook) and not fence_of_another_language:
            kind = type(self._call.rlm).__name__
            raise HookError(
                f"{kind} runs code in a way of its own: pre_execution_hook and post_execution_hook were left out",
                help="only subclasses of dspy.RLM that call its _execute_code can have these two",
            )
        self.code, self.result = code, result

    def recorded(self, outcome: Any) -> Any:
        """Return DSPy's outcome with the code that really ran in it."""
        if not self.rewritten:
            return outcome
        if not isinstance(outcome, type(self._history)):
            outcome.trajectory = [*outcome.trajectory[:-1], {**outcome.trajectory[-1], "code": self.code}]
            return outcome
        last = outcome.entries[-1].model_copy(update={"code": self.code})
        return outcome.model_copy(update={"entries": [*outcome.entries[:-1], last]})

    async def end(self, outcome: Any) -> tuple[Any, bool]:
        """Run the last hook; return the outcome and whether to stop here."""
        submitted = not isinstance(outcome, type(self._history))
        turned_off = not hasattr(type(self._call.rlm), "without_hooks")
        if turned_off or (submitted and not self._call.hooks.final):
            return outcome, False
        # The entry that a submission adds is only in the prediction.
        history = self._history.append(**outcome.trajectory[-1]) if submitted else outcome
        output = await self._ask("post_iteration_hook", self.pred, self.code, self.result, history)
        if output is None or submitted:
            return outcome, False
        if output.stop:
            log.info("post_iteration_hook ended the run in iteration %d", self._number)
        return (outcome if output.history is None else output.history), output.stop

    async def _ask(self, hook: str, *arguments: Any) -> Any:
        function = getattr(self._call.hooks, hook)
        if function is None:
            return None
        try:
            returned = function(self._number, *arguments)
            if inspect.isawaitable(returned):
                returned = await returned if self.awaits else _finish(returned)
        except Exception as error:
            _add_note(error, f"raised by {hook} in iteration {self._number}")
            raise
        return checked(hook, returned, self._history)

    def _set_up(self, field: str, code: str | None) -> None:
        if not code or self._call.setups.get(field) == code:
            return
        dspy = contract()
        try:
            result = self._repl.execute(code, variables=dict(self._input_args))
        except (dspy.code_error, SyntaxError) as error:
            # The hook's code, not the model's: the model could not mend it.
            raise HookError(f"pre_iteration_hook returned {field} that fails in the sandbox: {error}") from error
        if isinstance(result, dspy.final_output):
            raise HookError(f"pre_iteration_hook returned {field} that calls SUBMIT")
        self._call.setups[field] = code


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits to its end."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise AssertionError("a coroutine of an iteration waited under a plain call")


def _finish(awaitable: Any) -> Any:
    """Finish an awaitable under a plain call: on a thread, for there may be an event loop running on this one."""
    with ThreadPoolExecutor(1, "rlm-hook") as thread:
        return thread.submit(contextvars.copy_context().run, await_result, awaitable).result()


def _add_note(error: Exception, note: str) -> None:
    if not hasattr(error, "add_note"):  # Python 3.10: kept for whoever looks, but tracebacks do not show it
        log.error("%s %s", type(error).__name__, note)
        error.__dict__["__notes__"] = [*getattr(error, "__notes__", []), note]
        return
    error.add_note(note)
