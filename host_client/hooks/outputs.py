"""What hooks are, what they may return, and the check of what they did return."""

from __future__ import annotations

import dataclasses
import keyword
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from host_client.errors import HookError

# A result or a history may be a whole book.
_MAX_SHOWN_CHARS = 80


@dataclasses.dataclass(slots=True)
class PreIterationOutput:
    """What a ``pre_iteration_hook`` adds to an iteration.

    Attributes:
        extra_vars: Variables for this iteration's code, beside the inputs; the model is not told of them.
        python_code: Code that runs in the session before this iteration's. What it defines stays, so it runs once, and
            again only when it differs from the last one that ran in this call.
        persistent_python_code: The same under the name that newer versions of ``dspy-rlm-hooks`` have for it; runs
            before ``python_code``, and has its own record of what ran last. None or "" for no change.
        prompt_context: Text shown to the model in this iteration, at the end of ``variables_info``.
    """

    extra_vars: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    python_code: str = ""
    persistent_python_code: str | None = None
    prompt_context: str = ""


@dataclasses.dataclass(slots=True)
class PreExecutionOutput:
    """What a ``pre_execution_hook`` lets run.

    Attributes:
        code: Python to run in place of the model's; the history shows this.
    """

    code: str


@dataclasses.dataclass(slots=True)
class PostExecutionOutput:
    """What a ``post_execution_hook`` lets the model see.

    Attributes:
        result: Anything that an interpreter may return, in place of what it did return.
    """

    result: Any


@dataclasses.dataclass(slots=True)
class PostIterationOutput:
    """What a ``post_iteration_hook`` decides.

    Attributes:
        history: The ``REPLHistory`` to go on with; None for the one it was given.
        stop: Whether to end here and have the answer extracted from the history, by one more call of the model.
    """

    history: Any = None
    stop: bool = False


PreIterationHook = Callable[[int, list[Any], Any, dict[str, Any]], Any]
PreExecutionHook = Callable[[int, str, list[Any], Any, dict[str, Any]], Any]
PostExecutionHook = Callable[[int, str, Any, list[Any], Any, dict[str, Any]], Any]
PostIterationHook = Callable[[int, Any, str, Any, Any], Any]
RLMHook = PreIterationHook | PreExecutionHook | PostExecutionHook | PostIterationHook
Output = PreIterationOutput | PreExecutionOutput | PostExecutionOutput | PostIterationOutput
Returned = Output | Awaitable[Output | None] | None

#: Names of the hooks, with the names of what each is called with and the class that it may return.
HOOKS: dict[str, tuple[tuple[str, ...], type[Output]]] = {
    "pre_iteration_hook": (("iteration", "variables", "history", "input_args"), PreIterationOutput),
    "pre_execution_hook": (("iteration", "code", "variables", "history", "input_args"), PreExecutionOutput),
    "post_execution_hook": (("iteration", "code", "result", "variables", "history", "input_args"), PostExecutionOutput),
    "post_iteration_hook": (("iteration", "pred", "code", "result", "history"), PostIterationOutput),
}


def checked(hook: str, returned: Any, history: Any) -> Any:
    """Return what a hook returned if it may return that.

    Args:
        hook: The hook's name.
        returned: What it returned, awaited.
        history: A history of the running call: the class that a history must have.

    Raises:
        HookError: It may not; the message names the hook, what it returned and what is expected.
    """
    expected = HOOKS[hook][1]
    if returned is None:
        return None
    if not isinstance(returned, expected):
        foreign = type(returned).__name__ == expected.__name__
        raise HookError(
            f"{hook} returned {shown(returned)}; expected {expected.__name__}(...) or None",
            help=f"from host_client.hooks import {expected.__name__}" if foreign else None,
        )
    for field, value, wanted in _wrong_fields(returned, history):
        raise HookError(f"{hook} returned {expected.__name__} with {field}={shown(value)}; expected {wanted}")
    return returned


def shown(value: Any) -> str:
    """Return a value's type and the beginning of its repr."""
    try:
        text = repr(value)
    except Exception:  # a __repr__ of the user's making must not hide what is wrong
        text = "?"
    return f"{type(value).__name__} {text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + '...'}"


def _wrong_fields(output: Output, history: Any) -> list[tuple[str, Any, str]]:
    found: list[tuple[str, Any, str, bool]] = []
    if isinstance(output, PreIterationOutput):
        setup = output.persistent_python_code
        found = [
            ("extra_vars", output.extra_vars, "a dict with Python names as keys", _are_names(output.extra_vars)),
            ("python_code", output.python_code, "a str", isinstance(output.python_code, str)),
            ("persistent_python_code", setup, "a str or None", setup is None or isinstance(setup, str)),
            ("prompt_context", output.prompt_context, "a str", isinstance(output.prompt_context, str)),
        ]
    elif isinstance(output, PreExecutionOutput):
        found = [("code", output.code, "a str", isinstance(output.code, str))]
    elif isinstance(output, PostIterationOutput):
        kind, given = type(history), output.history
        found = [
            ("history", given, f"a {kind.__name__} or None", given is None or isinstance(given, kind)),
            ("stop", output.stop, "True or False", isinstance(output.stop, bool)),
        ]
    return [(field, value, wanted) for field, value, wanted, good in found if not good]


def _are_names(variables: Any) -> bool:
    return isinstance(variables, Mapping) and all(
        isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name) for name in variables
    )
