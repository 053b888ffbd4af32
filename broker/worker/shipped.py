"""Tools that run in the sandbox: a function from the host's source, in a namespace of its own."""

from __future__ import annotations
import __future__

import builtins
import linecache
import threading
from collections.abc import Callable
from typing import Any

#: Where the source leaves the function.
_FUNCTION_NAME = "__tool__"


class ToolUnavailable(RuntimeError):
    """A tool that runs in the sandbox could not be set up there, mostly for want of a package."""


class ShippedFunction:
    """One tool's function, made at its first call: what it imports may take long, or fail.

    What generated code does to its own names does not reach it.

    Args:
        name: The tool's name.
        source: Python source that binds the function to ``__tool__``.
    """

    def __init__(self, name: str, source: str) -> None:
        self._name, self._source = name, source
        # Guards _function: made once, whichever thread comes first.
        self._lock = threading.Lock()
        self._function: Callable[..., Any] | None = None

    def function(self) -> Callable[..., Any]:
        """Return the function.

        Raises:
            ToolUnavailable: Its source fails.
        """
        with self._lock:
            if self._function is None:
                self._function = self._make()
            return self._function

    def _make(self) -> Callable[..., Any]:
        filename = f"<tool {self._name}>"
        scope: dict[str, Any] = {"__builtins__": builtins, "__name__": f"tool_{self._name}"}
        try:
            # Annotations name what the host has; they are not evaluated here.
            flags = __future__.annotations.compiler_flag
            exec(compile(self._source, filename, "exec", flags, dont_inherit=True), scope)
            function: Callable[..., Any] = scope[_FUNCTION_NAME]
        except Exception as error:
            raise ToolUnavailable(
                f"{self._name}() cannot run in this sandbox: {type(error).__name__}: {error}"
            ) from error
        linecache.cache[filename] = (len(self._source), None, self._source.splitlines(keepends=True), filename)
        return function
