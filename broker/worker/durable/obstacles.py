"""What cannot be saved, in words, and where in a value it sits."""

from __future__ import annotations

import _thread
import io
import mmap
import socket
import subprocess
import threading
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

from broker.worker.display import safe_str, type_name

#: Objects that are looked at on the way to the one that is in the way.
_MAX_SEEN = 100_000
_MAX_REASON_CHARS = 300

_WORDS: dict[type, str] = {
    types.GeneratorType: "generator",
    types.CoroutineType: "coroutine",
    types.AsyncGeneratorType: "generator",
    types.FrameType: "stack frame",
    types.TracebackType: "traceback",
    io.FileIO: "open file",
    io.BufferedReader: "open file",
    io.BufferedWriter: "open file",
    io.BufferedRandom: "open file",
    io.TextIOWrapper: "open file",
    mmap.mmap: "memory map",
    memoryview: "memoryview",
    socket.socket: "socket",
    subprocess.Popen: "process",
    threading.Thread: "thread",
    _thread.LockType: "lock",
    _thread.RLock: "lock",
    _thread._local: "thread-local data",
}


class Obstacle(Exception):
    """Something that cannot be saved; the text is the reason."""


def word_for(kind: type) -> str | None:
    """Return what objects of a class are called that cannot be saved, or None where they may be."""
    return next((_WORDS[base] for base in type.__dict__["__mro__"].__get__(kind) if base in _WORDS), None)


def reason_of(name: str, value: Any, culprit: Any, error: BaseException) -> str:
    """Return in one line why a variable is not saved.

    Args:
        name: The variable.
        value: Its value.
        culprit: The last object that was looked at.
        error: What was raised there.
    """
    if isinstance(error, RecursionError) or "recursion" in safe_str(error):
        return "nested too deeply"
    what = safe_str(error) if isinstance(error, Obstacle) else f"{type_name(type(error))}: {safe_str(error)}"
    where = None if culprit is value or culprit is None else _path(name, value, culprit)
    return (what if where is None else f"{where}: {what}")[:_MAX_REASON_CHARS]


def _path(name: str, value: Any, wanted: Any) -> str | None:
    """Return how an object inside a value is reached, such as ``data['a'][0].handle``; None where it is not found."""
    pending = deque([(name, value)])
    seen = {id(value)}
    while pending and len(seen) < _MAX_SEEN:
        path, parent = pending.popleft()
        for step, child in _children(parent):
            if child is wanted:
                return f"{path}{step}"
            if id(child) not in seen:
                seen.add(id(child))
                pending.append((f"{path}{step}"[:_MAX_REASON_CHARS], child))
    return None


def _children(parent: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object holds; only with what runs none of its own code."""
    kind = type(parent)
    if kind in (list, tuple, deque):
        yield from ((f"[{index}]", child) for index, child in enumerate(parent))
    elif kind is dict:
        for key, child in parent.items():
            yield (f"[{key!r:.60}]" if type(key) in (str, int) else f"[<{type_name(type(key))}>]"), child
            yield "'s key", key
    elif kind in (set, frozenset):
        yield from (("'s member", child) for child in parent)
    elif kind is types.FunctionType:
        yield from _function_parts(parent)
    elif kind is types.MethodType:
        yield ".__self__", parent.__self__
    else:
        yield from _attributes(parent)


def _function_parts(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f"'s variable {name}", cell.cell_contents
        except ValueError:
            continue
    yield "'s defaults", function.__defaults__
    yield "'s defaults", function.__kwdefaults__
    yield from ((f".{name}", child) for name, child in function.__dict__.items())


def _attributes(parent: Any) -> Iterator[tuple[str, Any]]:
    try:
        attributes = object.__getattribute__(parent, "__dict__")
        found = list(attributes.items())
    except Exception:
        return
    yield from ((f".{name}", child) for name, child in found if type(name) is str)
