"""What a tool says about itself, and what it can learn about the call that it serves."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

_MARK = "__rlm_sandbox_idempotent__"
#: Wrappers around a tool, such as DSPy's; more of them than this is a loop.
_MAX_WRAPPERS = 20

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CurrentCall:
    """The tool call that runs now.

    Attributes:
        call_id: The broker's id.
        key: Idempotency key: the same for every attempt at this call, and for no other call. Give it to a service that
            refuses to do a thing twice.
        attempt: 1 for the first; more where the call runs again after a crash.
        execution_id: The execution that made the call.
        tool: The tool's name.
    """

    call_id: str
    key: str
    attempt: int
    execution_id: str
    tool: str


_current: contextvars.ContextVar[CurrentCall | None] = contextvars.ContextVar("rlm_sandbox_call", default=None)


def current_call() -> CurrentCall | None:
    """Return the call that the running tool serves, or None outside of one."""
    return _current.get()


@contextlib.contextmanager
def serving(call: CurrentCall) -> Iterator[None]:
    """Let ``current_call`` return this one."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


@overload
def tool(function: Function) -> Function: ...
@overload
def tool(*, idempotent: bool = False) -> Callable[[Function], Function]: ...


def tool(function: Function | None = None, *, idempotent: bool = False) -> Function | Callable[[Function], Function]:
    """Say of a function what the sandbox should know when it is a tool.

        @host_client.tool(idempotent=True)
        def look_up(word: str) -> str: ...

    Args:
        function: The function.
        idempotent: Running it twice for one call does no harm. After a crash it is run again, with the same
            ``current_call().key``, and its start costs no flush to the disk. Undeclared tools run at most once.
    """

    def mark(marked: Function) -> Function:
        setattr(marked, _MARK, idempotent)
        return marked

    return mark if function is None else mark(function)


def is_idempotent(function: Any) -> bool:
    """Tell whether a tool, or what it wraps, was declared idempotent."""
    for _ in range(_MAX_WRAPPERS):
        mark = getattr(function, _MARK, None)
        if isinstance(mark, bool):
            return mark
        # dspy.Tool and bound methods hold theirs in ``func`` and ``__func__``, functools.wraps in ``__wrapped__``.
        names = ("func", "__wrapped__", "__func__")
        function = next((held for name in names if (held := getattr(function, name, None)) is not None), None)
        if function is None:
            return False
    return False
