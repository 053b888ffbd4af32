"""What differs between DSPy 3.1, 3.2, 3.3 and 3.4, found by looking at the installed package.

The only module of ``host_client`` (beside the demo) that imports ``dspy``, and only when an interpreter is made:
the import takes more than a second.

Which exception means what:

    =====================  ==============================  ===========================================
    meaning                DSPy 3.3 and later              DSPy 3.1 and 3.2
    =====================  ==============================  ===========================================
    the model can go on    ``CodeExecutionError``          ``CodeInterpreterError``
    invalid source         ``SyntaxError``                 ``SyntaxError``
    the forward must end   ``CodeInterpreterError`` that   our own class alone: RLM would show a
                           is also our own class           ``CodeInterpreterError`` to the model forever
    =====================  ==============================  ===========================================
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from host_client.errors import SandboxError

#: Marks the callback of the history, which learns of interpreters without DSPy.
OURS = "__rlm_sandbox_observer__"

Method = TypeVar("Method", bound=Callable[..., Any])


class DspyContract:
    """What the installed DSPy expects of an interpreter. Use ``contract()``: one is enough.

    Attributes:
        final_output: Class of what SUBMIT gives.
        code_error: Class of errors that the model can repair.
        terminal_base: Class that errors which end the forward must be instances of, or None.
        reuses_after_shutdown: CodeAct and ProgramOfThought of DSPy 3.1 and 3.2 shut their interpreter down at the end
            of every forward, and use it again in the next.
    """

    def __init__(self) -> None:
        from dspy.primitives import code_interpreter

        self.final_output: type[Any] = code_interpreter.FinalOutput
        base: type[Exception] = code_interpreter.CodeInterpreterError
        recoverable: type[Exception] | None = getattr(code_interpreter, "CodeExecutionError", None)
        self.code_error: type[Exception] = recoverable or base
        self.terminal_base: type[Exception] | None = base if recoverable is not None else None
        self.reuses_after_shutdown = recoverable is None
        self._combined: dict[type[SandboxError], type[SandboxError]] = {}

    def terminal(self, error: SandboxError) -> SandboxError:
        """Return an error like ``error`` that ends DSPy's forward and is still an instance of its class."""
        if self.terminal_base is None or isinstance(error, self.terminal_base):
            return error
        kind = type(error)
        if kind not in self._combined:
            self._combined[kind] = _combine(kind, self.terminal_base)
        combined = self._combined[kind].__new__(self._combined[kind], *error.args)
        combined.__dict__.update(vars(error))
        return combined.with_traceback(error.__traceback__)


@functools.cache
def contract() -> DspyContract:
    """Return the contract of the installed DSPy, importing it the first time."""
    return DspyContract()


def _combine(kind: type[SandboxError], base: type[Exception]) -> type[SandboxError]:
    # Named and placed like the class that users catch and read about; DSPyError's own fields get their defaults.
    fields = {"__doc__": kind.__doc__, "__module__": kind.__module__, **_DSPY_ERROR_FIELDS}
    return cast("type[SandboxError]", type(kind.__name__, (kind, base), fields))


#: What ``DSPyError.__init__`` would set; our ``code``, ``message`` and ``status`` come first.
_DSPY_ERROR_FIELDS: dict[str, Any] = dict.fromkeys(("model", "provider", "provider_code", "request_id", "retry_after"))
_DSPY_ERROR_FIELDS["status"] = None


class _Observed:
    """A method that reports to DSPy's interpreter callbacks where the installed DSPy has them.

    What it really is can only be known once DSPy may be imported, so it is decided at the first use.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._plain = method
        self._method: Callable[..., Any] | None = None
        functools.update_wrapper(self, method)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return (self._method or self._decide()).__get__(instance, owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._method or self._decide())(*args, **kwargs)

    def _decide(self) -> Callable[..., Any]:
        from dspy.utils.callback import BaseCallback, with_callbacks

        # Before 3.3.1 the decorator would report an interpreter as if it were a module.
        understood = hasattr(BaseCallback, "on_interpreter_execute_start")
        self._method = _unless_only_ours(self._plain, with_callbacks(self._plain)) if understood else self._plain
        return self._method


def _unless_only_ours(plain: Callable[..., Any], observed: Callable[..., Any]) -> Callable[..., Any]:
    """Report nothing where nobody but our own observer would be told: it knows already, and DSPy's way costs 30 us."""
    import dspy

    settings = dspy.settings

    @functools.wraps(plain)
    def method(instance: Any, *args: Any, **kwargs: Any) -> Any:
        for callback in settings.callbacks:
            if not hasattr(callback, OURS):
                return observed(instance, *args, **kwargs)
        return observed(instance, *args, **kwargs) if instance.callbacks else plain(instance, *args, **kwargs)

    return method


def observed(method: Method) -> Method:
    """Report calls of ``start``, ``execute``, ``invoke_tool`` or ``shutdown`` to DSPy's callbacks."""
    return cast("Method", _Observed(method))


#: The id of a pool, and the named session that is held in it.
HeldPlace = tuple[int, str | None]
#: Among DSPy's settings, because those reach the threads of ``dspy.Parallel``, where context variables do not.
_HELD = "rlm_sandbox_held_places"


def holding() -> tuple[HeldPlace, ...]:
    """Return the places in pools that the executions hold in whose tools this runs."""
    if "dspy" not in sys.modules:
        return ()
    import dspy

    return tuple(dspy.settings.get(_HELD, ()))


@contextlib.contextmanager
def holding_also(place: HeldPlace) -> Iterator[None]:
    """Note in the block that what runs in it holds a place."""
    import dspy

    with dspy.context(**{_HELD: (*holding(), place)}):
        yield
