"""The pickler of a namespace: cloudpickle's, but functions find their globals in the namespace that they come into."""

from __future__ import annotations

import functools
import hashlib
import linecache
import marshal
import sys
import types
from collections.abc import Callable
from typing import Any

from broker.worker.cells import FILENAME_PREFIX
from broker.worker.durable import rebuild
from broker.worker.durable.obstacles import Obstacle, word_for

#: Protocol 5: arrays and other large buffers are written as they are.
PROTOCOL = 5
#: Files of restored code: no execution of the new session has one of these.
_SAVED_PREFIX = f"{FILENAME_PREFIX}saved "
_PROXY_MODULES = ("broker.worker.proxies", "broker.worker.submit", "broker.worker.durable.rebuild")
_FUNCTION_PARTS = ("__defaults__", "__kwdefaults__", "__annotations__", "__doc__", "__qualname__", "__module__")
_CACHED = type(functools.lru_cache(lambda: None))
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)


class _Anchor:
    """Takes the namespace's place where it is written; see ``NamespacePickler.anchor``."""


def is_tool(value: Any) -> bool:
    """Tell whether a value is SUBMIT or a tool: these are the interpreter's, not the session's."""
    return type(value) is types.FunctionType and value.__globals__.get("__name__") in _PROXY_MODULES


@functools.cache
def pickler_class() -> Callable[..., Any]:
    """Return the class; cloudpickle is imported only now.

    Raises:
        ImportError: The sandbox's image has none.
    """
    import cloudpickle

    class NamespacePickler(cloudpickle.Pickler):  # type: ignore[misc]
        """Writes one value after the other, in which what is shared stays shared.

        Args:
            file: Written to.
            namespace: The session's.

        Attributes:
            last: The object that was looked at last: after an error, mostly the one that is in the way.
            modules: Modules that are needed to read all this.
            sources: Text of the functions' source by file name.
        """

        def __init__(self, file: Any, namespace: dict[str, Any]) -> None:
            super().__init__(file, protocol=PROTOCOL)
            self._namespace = namespace
            self._words: dict[type, str | None] = {}
            self._files: dict[str, str] = {}
            self.memo: Any
            self.last: Any = None
            self.modules: set[str] = set()
            self.sources: dict[str, str] = {}

        def anchor(self) -> None:
            """Write how to get the namespace; from then on each reference to it, wherever it is, means that."""
            anchor = _Anchor()
            self.dump(anchor)
            memo: dict[int, tuple[int, Any]] = self.memo.copy()
            position, _ = memo.pop(id(anchor))
            memo[id(self._namespace)] = (position, self._namespace)
            self.memo = memo

        def forget_from(self, marker: Any) -> None:
            """Take back what was written from an object on; the caller cuts it off."""
            memo = self.memo.copy()
            if id(marker) in memo:
                first = memo[id(marker)][0]
                self.memo = {key: entry for key, entry in memo.items() if entry[0] < first}

        def reducer_override(self, obj: Any) -> Any:
            kind = type(obj)
            self.last = obj
            if kind is types.FunctionType:
                if obj.__globals__ is self._namespace:
                    return self._reduce_function(obj)
                if is_tool(obj) and obj.__closure__:
                    return rebuild.tool, (obj.__name__,)
            elif kind is types.CodeType:
                return rebuild.code, (marshal.dumps(self._renamed(obj)),)
            elif kind is types.CellType:
                return rebuild.cell, ()
            elif kind is _CACHED and getattr(obj.__wrapped__, "__globals__", None) is self._namespace:
                return rebuild.cached, (obj.__wrapped__, obj.cache_parameters())
            elif kind is _Anchor:
                return rebuild.namespace, ()
            self._note(obj, kind)
            return super().reducer_override(obj)

        def _note(self, obj: Any, kind: type) -> None:
            name = obj.__name__ if kind is types.ModuleType else obj.__module__ if isinstance(obj, _NAMED) else None
            if type(name) is str:
                if name not in self.modules and not _can_be_imported(name):
                    raise Obstacle(f"of the module {name!r}, which code made and no file")
                self.modules.add(name)
            else:
                if kind not in self._words:
                    self._words[kind] = word_for(kind)
                if self._words[kind] is not None:
                    raise Obstacle(self._words[kind])

        def _reduce_function(self, function: types.FunctionType) -> Any:
            state = {name: getattr(function, name) for name in _FUNCTION_PARTS}
            if parameters := getattr(function, "__type_params__", ()):  # from Python 3.12 on
                state["__type_params__"] = parameters
            cells = function.__closure__
            state["dict"] = function.__dict__
            state["cells"] = [[cell, cell.cell_contents] for cell in cells or () if _is_set(cell)]
            arguments = (function.__code__, function.__name__, cells)
            return rebuild.function, arguments, state, None, None, rebuild.set_function

        def _renamed(self, code: types.CodeType) -> types.CodeType:
            """Return code under a file name that tells its source apart from every other one's."""
            if not code.co_filename.startswith(FILENAME_PREFIX):
                return code
            name = self._file(code.co_filename)
            constants = tuple(self._renamed(c) if isinstance(c, types.CodeType) else c for c in code.co_consts)
            return code.replace(co_filename=name, co_consts=constants)

        def _file(self, name: str) -> str:
            if name not in self._files:
                text = "".join(linecache.getlines(name))
                digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
                new = name if name.startswith(_SAVED_PREFIX) else f"{_SAVED_PREFIX}{digest}>"
                self._files[name] = new
                if text:
                    self.sources[new] = text
            return self._files[name]

    return NamespacePickler


def _can_be_imported(name: str) -> bool:
    """Tell whether a module comes from the import system; one that is not in ``sys.modules`` is saved as a value."""
    return name == "__main__" or name not in sys.modules or getattr(sys.modules[name], "__spec__", None) is not None


def _is_set(cell: types.CellType) -> bool:
    try:
        return bool((cell.cell_contents,))
    except ValueError:
        return False
