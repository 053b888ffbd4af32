"""The wrappers around DSPy's own methods. None of them does what DSPy does; each calls it and adds the hooks.

What is taken for granted of ``dspy.RLM`` 3.1.3 to 3.4.1, and held by ``tests/conformance/test_hooks.py``:

- ``_execute_iteration`` and ``_aexecute_iteration`` return what ``_process_execution_result`` returned.
- Before that, code goes through ``_execute_code`` (from 3.2) or straight to ``repl.execute`` (3.1). For what the model
  can mend they have text that begins with "[Error]"; other errors leave.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

from host_client.dspy_compat import contract
from host_client.errors import HookError
from host_client.hooks.iteration import Call, Hooks, Iteration, Later, current, drive, running

#: Where an RLM keeps its hooks, in its ``__dict__``.
ATTRIBUTE = "_rlm_sandbox_hooks"
#: Arguments that are needed here, by DSPy's names for them; there may be others.
_OF_ITERATION = frozenset({"repl", "variables", "history", "iteration", "input_args", "output_field_names"})
_OF_RESULT = frozenset({"pred", "result"})


class Wrapped:
    """The methods of an RLM with hooks; ``enabling`` puts them into a subclass of the RLM's class.

    It is no base of that class, which has to have one base only: else Python may refuse to make an object of it out of
    one of the other.

    Attributes:
        with_hooks: The subclass.
        without_hooks: Its base.
    """

    with_hooks: Any
    without_hooks: Any

    def _execute_iteration(self, *args: Any, **kwargs: Any) -> Any:
        plain = self._plain()
        method = plain._execute_iteration
        arguments = _bound(method, args, kwargs, _OF_ITERATION)
        with running(self._call()) as call:
            iteration = Iteration(call, arguments.arguments, awaits=False)
            self._apply(plain, arguments, *drive(iteration.begin()), iteration)
            with iteration.running():
                outcome = method(*arguments.args, **arguments.kwargs)
            outcome, stop = drive(iteration.end(outcome))
            return cast("Any", self)._extract_fallback(*iteration.for_extraction(outcome)) if stop else outcome

    async def _aexecute_iteration(self, *args: Any, **kwargs: Any) -> Any:
        plain = self._plain()
        method = plain._aexecute_iteration
        arguments = _bound(method, args, kwargs, _OF_ITERATION)
        with running(self._call()) as call:
            iteration = Iteration(call, arguments.arguments, awaits=True)
            self._apply(plain, arguments, *await iteration.begin(), iteration)
            with iteration.running():
                outcome = await method(*arguments.args, **arguments.kwargs)
            if iteration.later is not None:
                if outcome is not iteration.later:
                    kind = self.without_hooks.__name__
                    raise HookError(
                        f"{kind}._aexecute_iteration does not return what it is given: no hooks under acall"
                    )
                outcome = await iteration.later.finish(iteration)
            outcome, stop = await iteration.end(outcome)
            return await cast("Any", self)._aextract_fallback(*iteration.for_extraction(outcome)) if stop else outcome

    def _execute_code(self, repl: Any, code: str, input_args: dict[str, Any]) -> Any:
        plain = getattr(self._plain(), "_execute_code", _execute_code_of_3_1)

        def execute(code: str) -> Any:
            return plain(repl, code, input_args)

        iteration = self._iteration()
        if iteration is None:
            return execute(code)
        if iteration.awaits:
            iteration.later = Later(code, execute)
            return iteration.later
        return drive(iteration.run(code, execute))

    def _process_execution_result(self, *args: Any, **kwargs: Any) -> Any:
        method = self._plain()._process_execution_result
        iteration = self._iteration()
        if iteration is None:
            return method(*args, **kwargs)
        if iteration.error is not None:
            raise iteration.error
        arguments = _bound(method, args, kwargs, _OF_RESULT)
        iteration.pred = arguments.arguments["pred"]

        def record(result: Any) -> Any:
            arguments.arguments["result"] = result
            return iteration.recorded(method(*arguments.args, **arguments.kwargs))

        result = arguments.arguments["result"]
        if isinstance(result, Later):
            result.record = record
            return result
        if not iteration.ran:
            iteration.did_not_run(iteration.pred.code, result)
        return record(result)

    def _plain(self) -> Any:
        # Asked for before any hook runs: one may turn the hooks off, and this is no object of the subclass any more.
        return super(self.with_hooks, self)

    def _call(self) -> Call:
        # Somebody may call an iteration by itself, or turn hooks on in the middle of a call.
        return current(self) or Call(self, self.__dict__.get(ATTRIBUTE, Hooks()))

    def _iteration(self) -> Iteration | None:
        call = current(self)
        return None if call is None else call.iteration

    def _apply(
        self,
        plain: Any,
        arguments: inspect.BoundArguments,
        variables: list[Any],
        inputs: dict[str, Any],
        iteration: Iteration,
    ) -> None:
        arguments.arguments.update(variables=variables, input_args=inputs)
        if not hasattr(plain, "_execute_code"):
            arguments.arguments["repl"] = _Seam(self, arguments.arguments["repl"], iteration)


class _Seam:
    """An interpreter for DSPy 3.1, which has no ``_execute_code``: what is to be executed goes there all the same.

    DSPy 3.1 turns some errors that come from here into text for the model; what must end the call is kept, and raised
    where DSPy does not look.
    """

    def __init__(self, rlm: Wrapped, repl: Any, iteration: Iteration) -> None:
        self._rlm, self._repl, self._iteration = rlm, repl, iteration

    def execute(self, code: str, variables: dict[str, Any] | None = None) -> Any:
        if not hasattr(self._rlm, "_execute_code"):  # hooks were turned off meanwhile
            return self._repl.execute(code, variables=variables)
        try:
            return self._rlm._execute_code(self._repl, code, variables or {})
        except Exception as error:
            self._iteration.error = error
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._repl, name)


def _execute_code_of_3_1(repl: Any, code: str, input_args: dict[str, Any]) -> Any:
    try:
        return repl.execute(code, variables=dict(input_args))
    except (contract().code_error, SyntaxError) as error:
        return f"[Error] {error}"


def _bound(
    method: Any, args: tuple[Any, ...], kwargs: dict[str, Any], needed: frozenset[str]
) -> inspect.BoundArguments:
    """Return the arguments by DSPy's names: a subclass may have ``*args`` in their place."""
    signature = inspect.signature(method)
    for kind in type(method.__self__).__mro__:
        if needed <= signature.parameters.keys():
            break
        if (inherited := vars(kind).get(method.__name__)) is not None:
            signature = inspect.signature(functools.partial(inherited, method.__self__))
    return signature.bind(*args, **kwargs)
