"""Tags every thread with the execution that started it, directly or through other threads."""

from __future__ import annotations

import _thread
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

from broker.worker.current import Current, Execution


class ThreadTags:
    """Tags threads, and work handed to the threads of a pool.

    Args:
        current: Holds the tags and the running execution.
    """

    def __init__(self, current: Current) -> None:
        self._current = current
        self._pools_patched = False

    def install(self) -> None:
        """Patch the starting of threads for the life of this process."""
        starts: dict[Any, Any] = {}
        for module in (_thread, threading):
            for name in (
                "start_new_thread",
                "start_joinable_thread",
                "_start_new_thread",
                "_start_joinable_thread",
                "start_new",
            ):
                start = getattr(module, name, None)
                if start is not None:
                    wrapped = starts.get(start) or starts.setdefault(start, self._tagging(start))
                    setattr(module, name, wrapped)

    def adopt_pools(self) -> None:
        """Make a pool that outlives an execution work for whoever submits; called at each start, cheap."""
        module = sys.modules.get("concurrent.futures.thread")
        if module is None or self._pools_patched:
            return
        self._pools_patched = True
        pool: Any = module.ThreadPoolExecutor
        submit = pool.submit
        current = self._current

        @functools.wraps(submit)
        def tagged_submit(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            return submit(self, _TaggedCall(fn, current), *args, **kwargs)

        pool.submit = tagged_submit

    def _tagging(self, start: Callable[..., Any]) -> Callable[..., Any]:
        current = self._current

        @functools.wraps(start)
        def starting(function: Any, /, *args: Any, **kwargs: Any) -> Any:
            if callable(function):
                function = _TaggedCall(function, current)
            return start(function, *args, **kwargs)

        return starting


class _TaggedCall:
    """A function that runs, in whatever thread, for the execution in which it was handed over."""

    __slots__ = ("_current", "_function", "_owner")

    def __init__(self, function: Callable[..., Any], current: Current) -> None:
        self._function = function
        self._current = current
        self._owner: Execution | None = current.owner()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tag = self._current.tag
        before, tag.execution = tag.execution, self._owner
        try:
            return self._function(*args, **kwargs)
        finally:
            tag.execution = before

    def __repr__(self) -> str:
        return repr(self._function)
