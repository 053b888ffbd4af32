"""Importing what generated code shall find imported already, in the process that workers are forked from."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

_MAX_REASON_CHARS = 500

#: Generators of random numbers that would go on alike in every fork. Python's own ``random`` sees to itself.
_SEEDED_ANEW = ("numpy.random",)


class PreloadError(Exception):
    """A module cannot be preloaded; the text names it and says why."""


def preload(names: Iterable[str], announce: Callable[[str], None]) -> None:
    """Import modules that workers will inherit.

    Args:
        names: Modules, such as ``pandas``.
        announce: Told of each before it is imported: one that crashes can say nothing itself.

    Raises:
        PreloadError: One cannot be imported, or leaves threads running, which no fork would have.
    """
    for name in names:
        announce(name)
        try:
            importlib.import_module(name)
        except BaseException as error:  # a module may do anything, also end the program
            reason = f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS]
            raise PreloadError(f"{name!r} cannot be imported: {reason}") from error
        if threads := _threads_beyond_a_fork():
            raise PreloadError(f"{name!r} leaves {threads} threads running, which sessions would not have")


def seed_anew() -> None:
    """In a forked process: let global generators of random numbers differ from its siblings'."""
    for name in _SEEDED_ANEW:
        module: Any = sys.modules.get(name)
        if module is not None:
            module.seed()


def _threads_beyond_a_fork() -> int:
    """Count the other threads that outlast a fork: OpenBLAS ends its own before one, and starts them anew."""
    if _other_threads():
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return _other_threads()


def _other_threads() -> int:
    return len(os.listdir("/proc/self/task")) - 1
