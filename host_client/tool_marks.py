"""What a tool says about itself, and what it can learn about the call that it serves."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import keyword
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar, overload

from host_client.errors import BadSetting
from host_client.tool_docs import with_returns
from host_client.tool_gate import Gate
from host_client.tool_source import SandboxSource, check_requirements, sandbox_source

_MARK = "__rlm_sandbox_tool__"
#: Wrappers around a tool, such as DSPy's; more of them than this is a loop.
_MAX_WRAPPERS = 20

HOST, SANDBOX = "host", "sandbox"

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolMarks:
    """What was declared of a tool; see ``tool`` for the meaning.

    Attributes:
        name: Name in the sandbox where no dict gives it another, or None for the function's own.
        idempotent: Running it twice for one call does no harm.
        timeout_s: Seconds that a call may take, or None.
        gate: Lets so many calls run at the same time, or None.
        max_calls: Calls of one execution, or None.
        shipped: For a tool that runs in the sandbox: what is sent there.
    """

    name: str | None = None
    idempotent: bool = False
    timeout_s: float | None = None
    gate: Gate | None = None
    max_calls: int | None = None
    shipped: SandboxSource | None = None

    @property
    def limited(self) -> bool:
        """Whether any limit was declared."""
        return self.timeout_s is not None or self.gate is not None or self.max_calls is not None


#: Of a function that nobody declared anything about.
UNMARKED = ToolMarks()


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
def tool(
    function: Callable[..., Any],
    *,
    name: str | None = ...,
    description: str | None = ...,
    idempotent: bool = ...,
    timeout_s: float | None = ...,
    max_concurrent: int | None = ...,
    max_calls: int | None = ...,
    where: str = ...,
    requirements: Collection[str] = ...,
) -> Callable[..., Any]: ...
@overload
def tool(
    *,
    name: str | None = ...,
    description: str | None = ...,
    idempotent: bool = ...,
    timeout_s: float | None = ...,
    max_concurrent: int | None = ...,
    max_calls: int | None = ...,
    where: str = ...,
    requirements: Collection[str] = ...,
) -> Callable[[Function], Function]: ...


def tool(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    idempotent: bool = False,
    timeout_s: float | None = None,
    max_concurrent: int | None = None,
    max_calls: int | None = None,
    where: str = HOST,
    requirements: Collection[str] = (),
) -> Any:
    """Say of a function what the sandbox should know when it is a tool.

        @host_client.tool(idempotent=True, timeout_s=10, max_concurrent=4)
        def look_up(word: str) -> str: ...

        tools = [host_client.tool(json.dumps, name="to_json", max_calls=100)]

    As a decorator it returns the function itself. Given a function (one that you cannot decorate) together with
    options, it returns a wrapper and leaves the function as it is.

    Args:
        function: The function, plain or async; no generator.
        name: Its name in the sandbox, where no dict of tools gives it another.
        description: What the model reads in place of the docstring. What it returns is added from its annotation.
        idempotent: Running it twice for one call does no harm. After a crash it is run again, with the same
            ``current_call().key``, and its start costs no flush to the disk. Undeclared tools run at most once.
        timeout_s: Seconds from the call to its answer, waiting for a place included. Then the code gets a
            ``TimeoutError``. An async tool is cancelled; another goes on in its thread, and its result is dropped.
        max_concurrent: How many calls run at the same time, in all interpreters of this process together; others
            wait. A call that timed out keeps its place until the function has ended.
        max_calls: How many calls one execution may make. The next raises ``ToolError`` in the code, with the type
            ``ToolBudgetExceeded``.
        where: ``host``, or ``sandbox``: then its source is sent there and it runs beside the generated code.
        requirements: For ``sandbox``: packages that it needs there, as ``NAME`` or ``NAME==VERSION``.

    Raises:
        BadSetting: An option that cannot work, or a function that cannot be such a tool; the message names it.
    """

    def mark(marked: Any) -> Any:
        label = _label(name, marked)
        check_runnable(label, marked)
        if type(marked).__module__.partition(".")[0] == "dspy":
            raise BadSetting(
                f"tool {label!r} is a dspy.Tool already", help="declare its function: dspy.Tool(host_client.tool(...))"
            )
        if where not in (HOST, SANDBOX):
            raise BadSetting(f"tool {label!r}: where must be 'host' or 'sandbox', got {where!r:.80}")
        marks = ToolMarks(
            name=name,
            idempotent=_flag(label, "idempotent", idempotent),
            timeout_s=_seconds(label, "timeout_s", timeout_s),
            gate=None if max_concurrent is None else Gate(_count(label, "max_concurrent", max_concurrent)),
            max_calls=None if max_calls is None else _count(label, "max_calls", max_calls),
            shipped=_shipped(label, marked, where, requirements),
        )
        if marks.shipped is not None and marks.limited:
            raise BadSetting(f"tool {label!r}: the host's limits cannot hold for a tool that runs in the sandbox")
        options = marks != UNMARKED or description is not None
        return _marked(marked, marks, description, wrap=function is not None and options)

    return mark if function is None else mark(function)


def marks_of(function: Any) -> ToolMarks:
    """Return what was declared of a tool, or of what it wraps."""
    for each in _layers(function):
        marks = getattr(each, _MARK, None)
        if isinstance(marks, ToolMarks):
            return marks
    return UNMARKED


def check_runnable(name: str, function: Any) -> None:
    """Refuse what can be called and still is no tool.

    Raises:
        BadSetting: It is not callable, or a generator.
    """
    if not callable(function):
        raise BadSetting(f"tool {name!r} is not callable: {type(function).__name__}")
    for each in _layers(function):
        if inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each):
            raise BadSetting(f"tool {name!r} is a generator; a tool gives one value: return a list")


def _layers(function: Any) -> Iterator[Any]:
    """Yield a function and what it wraps."""
    # dspy.Tool and bound methods hold theirs in ``func`` and ``__func__``, functools.wraps in ``__wrapped__``.
    for _ in range(_MAX_WRAPPERS):
        yield function
        names = ("func", "__wrapped__", "__func__")
        function = next((held for name in names if callable(held := getattr(function, name, None))), None)
        if function is None:
            return


def _marked(function: Any, marks: ToolMarks, description: str | None, *, wrap: bool) -> Any:
    """Return the function with its marks, in a wrapper where it is not ours to change or cannot be."""
    if not wrap:
        try:
            setattr(function, _MARK, marks)
        except (AttributeError, TypeError):  # a builtin
            wrap = True
    marked = _wrapper(function) if wrap else function
    setattr(marked, _MARK, marks)
    if marks.name is not None:
        marked.__name__ = marks.name
    # DSPy reads both off the function.
    marked.__doc__ = with_returns(description or inspect.getdoc(function) or "", function) or None
    return marked


def _wrapper(function: Any) -> Any:
    def plain(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    wrapper: Any = functools.update_wrapper(awaited if inspect.iscoroutinefunction(function) else plain, function)
    if not hasattr(function, "__name__"):  # a partial, or an object with __call__
        wrapper.__name__ = name_of(function) or "tool"
    return wrapper


def name_of(function: Any) -> str | None:
    """Return the name that a function has as a tool where no dict gives it one, or None."""
    for each in _layers(function):
        # dspy.Tool has ``name`` and ``func``, a function ``__name__``.
        attributes = ("name", "__name__") if hasattr(each, "func") else ("__name__",)
        for attribute in attributes:
            if isinstance(name := getattr(each, attribute, None), str):
                return name
    return None


def _shipped(label: str, function: Any, where: str, requirements: Any) -> SandboxSource | None:
    wanted = check_requirements(label, requirements)
    if where == SANDBOX:
        return sandbox_source(label, function, wanted)
    if wanted:
        raise BadSetting(f"tool {label!r}: requirements are for where='sandbox'; on the host, install them")
    return None


def _label(name: Any, function: Any) -> str:
    """Return what errors call the tool."""
    if name is None:
        return name_of(function) or "?"
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise BadSetting(f"tool name {name!r:.80} is not a Python identifier")
    return name


def _flag(label: str, option: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadSetting(f"tool {label!r}: {option} must be True or False, got {value!r:.80}")
    return value


def _seconds(label: str, option: str, value: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0.001 <= value <= 1e9:
        raise BadSetting(f"tool {label!r}: {option} must be seconds (at least 0.001) or None, got {value!r:.80}")
    return float(value)


def _count(label: str, option: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise BadSetting(f"tool {label!r}: {option} must be a whole number of 1 or more, or None; got {value!r:.80}")
    return value


def is_idempotent(function: Any) -> bool:
    """Tell whether a tool, or what it wraps, was declared idempotent."""
    return marks_of(function).idempotent
