"""What a saved session calls to come into being again. Its names and arguments are part of the file's format."""

from __future__ import annotations

import contextlib
import functools
import marshal
import types
from collections.abc import Iterator
from typing import Any

#: State of the process, which is one session's: the namespace that is being restored.
_target: dict[str, Any] = {}


@contextlib.contextmanager
def into(target: dict[str, Any]) -> Iterator[None]:
    """Restore into this namespace for as long as the ``with`` lasts."""
    global _target
    before, _target = _target, target
    try:
        yield
    finally:
        _target = before


def namespace() -> dict[str, Any]:
    """Return the session's namespace itself: functions look their globals up in it, as it will be then."""
    return _target


def code(data: bytes) -> types.CodeType:
    """Return a code object; the format is that of one minor version of Python."""
    made: types.CodeType = marshal.loads(data)  # noqa: S302
    return made


def cell() -> types.CellType:
    """Return a variable of a closure without its value, which comes with the function."""
    return types.CellType()


def function(made_of: types.CodeType, name: str, cells: tuple[types.CellType, ...] | None) -> types.FunctionType:
    """Return a function of the namespace, still without its defaults and its closure's values."""
    return types.FunctionType(made_of, namespace(), name, None, cells)


def set_function(made: types.FunctionType, state: dict[str, Any]) -> None:
    """Give a function the rest: what may refer to the function itself."""
    for variable, value in state.pop("cells"):
        variable.cell_contents = value
    made.__dict__.update(state.pop("dict"))
    for name, value in state.items():
        setattr(made, name, value)


def tool(name: str) -> Any:
    """Return the tool of this name that the restored session has, or one that looks for it when it is called."""
    target = namespace()
    if name in target:
        return target[name]

    def later(*args: Any, **kwargs: Any) -> Any:
        found = target.get(name)
        if found is None:
            raise NameError(f"the tool {name!r} of the saved session is not among the tools of this one")
        return found(*args, **kwargs)

    later.__name__ = later.__qualname__ = name
    return later


def cached(wrapped: Any, parameters: dict[str, Any]) -> Any:
    """Return a function behind ``functools.lru_cache``, with nothing in its cache."""
    return functools.lru_cache(**parameters)(wrapped)
