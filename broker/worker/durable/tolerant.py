"""Reads a saved namespace although parts of it fail: these become nothing, and what held them is named."""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable
from typing import Any, ClassVar

from broker.worker.display import safe_str, type_name

_base: Any = pickle._Unpickler
#: Shared by everything, and harmless.
_HARMLESS = (str, bytes, int, float, types.ModuleType, types.BuiltinFunctionType)


class Broken:
    """Stands for what could not be made; takes whatever is done to it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Broken:  # noqa: D102
        return object.__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Broken:  # noqa: D102
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None:
        """Take an item."""

    def extend(self, items: Any) -> None:
        """Take items."""

    def add(self, item: Any) -> None:
        """Take an item."""


class _Memo(dict[int, Any]):
    """What was read before, by its position; tells when it is referred to."""

    def __init__(self, got: Callable[[int, Any], None]) -> None:
        super().__init__()
        self._got = got

    def __getitem__(self, position: int) -> Any:
        found = super().__getitem__(position)
        self._got(position, found)
        return found


class TolerantUnpickler(_base):  # type: ignore[misc]
    """Python's own unpickler, in Python: slower, but each of its steps can be kept from ending all of it."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.memo = _Memo(self._got)
        self._reasons: list[str] = []
        self._first = 0
        self._broken: list[tuple[int, int, str]] = []

    def load_named(self, name: str) -> tuple[Any, str | None]:
        """Read one value; return it, and why it is not whole, if so."""
        self._first, self._reasons = len(self.memo), []
        value = self.load()
        if not self._reasons:
            return value, None
        self._broken.append((self._first, len(self.memo), name))
        return value, self._reasons[0]

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for."""
        try:
            return super().find_class(module, name)
        except Exception as error:
            self.note(error)
            return Broken

    def note(self, error: Exception) -> None:
        """Remember what went wrong."""
        self._reasons.append(f"{type_name(type(error))}: {safe_str(error)}"[:300])

    def _got(self, position: int, found: Any) -> None:
        if self._reasons or position >= self._first or isinstance(found, _HARMLESS):
            return
        for first, after, name in self._broken:
            if first <= position < after:
                self._reasons.append(f"shares data with {name!r}, which could not be restored")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_base.dispatch)


def _making(step: Callable[[Any], None], takes: int) -> Callable[[Any], None]:
    """Wrap a step that takes so many things from the stack and puts one there."""

    def tolerant(self: Any) -> None:
        below = len(self.stack) - takes
        try:
            step(self)
        except Exception as error:
            self.note(error)
            self.stack[below:] = [Broken()]

    return tolerant


def _changing(step: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap a step that first takes what it needs from the stack, and then changes the thing below."""

    def tolerant(self: Any) -> None:
        try:
            step(self)
        except (EOFError, pickle.UnpicklingError):
            raise
        except Exception as error:
            self.note(error)

    return tolerant


for _code, _takes in ((pickle.REDUCE, 2), (pickle.NEWOBJ, 2), (pickle.NEWOBJ_EX, 3)):
    TolerantUnpickler.dispatch[_code[0]] = _making(_base.dispatch[_code[0]], _takes)
for _code in (pickle.BUILD, pickle.SETITEM, pickle.SETITEMS, pickle.APPEND, pickle.APPENDS, pickle.ADDITEMS):
    TolerantUnpickler.dispatch[_code[0]] = _changing(_base.dispatch[_code[0]])
