"""Turning hooks on and off: an RLM with hooks is of a subclass of its class, made here.

A subclass, and not functions put on the instance, because it wraps DSPy's methods with ``super()`` whatever their
arguments, and because copies (``copy.deepcopy``, ``Module.deepcopy``, optimizers) then call their own methods, not the
original's. The subclass keeps name, module and documentation of the class.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from host_client.errors import BadSetting
from host_client.hooks.iteration import Call, Hooks, running
from host_client.hooks.outputs import (
    HOOKS,
    PostExecutionHook,
    PostIterationHook,
    PreExecutionHook,
    PreIterationHook,
    shown,
)
from host_client.hooks.wrapping import ATTRIBUTE, Wrapped

_NEEDED = ("forward", "aforward", "_execute_iteration", "_aexecute_iteration", "_process_execution_result")


def enable_rlm_hooks(
    rlm: Any,
    *,
    pre_iteration_hook: PreIterationHook | None = None,
    pre_execution_hook: PreExecutionHook | None = None,
    post_execution_hook: PostExecutionHook | None = None,
    post_iteration_hook: PostIterationHook | None = None,
    final: bool | None = None,
) -> None:
    """Have these functions called around each iteration of this RLM; they may be coroutine functions.

    Called again, it replaces the hooks that are given and leaves the others; ``disable_rlm_hooks`` removes all. A call
    that is under way keeps the hooks that it began with.

    Args:
        rlm: A ``dspy.RLM``, or of a subclass.
        pre_iteration_hook: Before the model writes code; may add variables and run code of its own.
        pre_execution_hook: After that; may rewrite the code.
        post_execution_hook: After the code ran; may change what came of it.
        post_iteration_hook: When history has it; may change the history or stop the run.
        final: Whether ``post_iteration_hook`` is called after a SUBMIT too, which ends the run whatever it returns.
            At first False; None for no change.

    Raises:
        BadSetting: This is no RLM, or a hook cannot be called with the arguments it will get.
    """
    given = {
        "pre_iteration_hook": pre_iteration_hook,
        "pre_execution_hook": pre_execution_hook,
        "post_execution_hook": post_execution_hook,
        "post_iteration_hook": post_iteration_hook,
    }
    _check_rlm(rlm)
    kind: Any = type(rlm)
    for name, hook in given.items():
        _check_hook(name, hook)
    changes = {name: value for name, value in {**given, "final": final}.items() if value is not None}
    rlm.__dict__[ATTRIBUTE] = dataclasses.replace(rlm.__dict__.get(ATTRIBUTE, Hooks()), **changes)
    if not _has_hooks(rlm):
        rlm.__class__ = _with_hooks(kind)


def disable_rlm_hooks(rlm: Any) -> None:
    """Make an RLM what it was before ``enable_rlm_hooks``; does nothing to one without hooks.

    A call that is under way loses them too.
    """
    if _has_hooks(rlm):
        rlm.__class__ = rlm.without_hooks
    rlm.__dict__.pop(ATTRIBUTE, None)


def _has_hooks(rlm: Any) -> bool:
    return "without_hooks" in vars(type(rlm))


def _check_rlm(rlm: Any) -> None:
    missing = [name for name in _NEEDED if not callable(getattr(type(rlm), name, None))]
    if missing:
        raise BadSetting(
            f"enable_rlm_hooks: {type(rlm).__name__} is no dspy.RLM (it has no {missing[0]})",
            help="give the dspy.RLM itself, such as program.rlm, not the module that holds it",
        )


def _check_hook(name: str, hook: Any) -> None:
    if hook is None:
        return
    arguments = HOOKS[name][0]
    if not callable(hook):
        raise BadSetting(f"{name} is {shown(hook)}; expected a function of ({', '.join(arguments)})")
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):
        return  # written in C: nobody knows before the call
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise BadSetting(f"{name} takes {signature}; it is called with ({', '.join(arguments)}): {error}") from None


@functools.cache
def _with_hooks(kind: Any) -> Any:
    """Return the subclass of a class of RLM that calls hooks."""
    members = {
        **{name: member for name, member in vars(Wrapped).items() if inspect.isfunction(member)},
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "without_hooks": kind,
        "forward": _as_one_call(kind),
        "aforward": _as_one_acall(kind),
        "__reduce_ex__": _reduce_ex,
    }
    made = type(kind)(kind.__name__, (kind,), members)
    made.with_hooks = made
    return made


def _as_one_call(kind: Any) -> Callable[..., Any]:
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with running(Call(self, self.__dict__[ATTRIBUTE])):
            return kind.forward(self, *args, **kwargs)

    return forward


def _as_one_acall(kind: Any) -> Callable[..., Any]:
    @functools.wraps(kind.aforward)
    async def aforward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with running(Call(self, self.__dict__[ATTRIBUTE])):
            return await kind.aforward(self, *args, **kwargs)

    return aforward


def _reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
    # The class is made, not imported: a copy or a pickle (Module.save(save_program=True)) has it made again.
    _, _, *state = self.without_hooks.__reduce_ex__(self, max(2, int(protocol)))
    return _new_with_hooks, (self.without_hooks,), *state


def _new_with_hooks(kind: Any) -> Any:
    return object.__new__(_with_hooks(kind))
