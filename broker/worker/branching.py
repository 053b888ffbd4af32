"""A copy of this process: fork, and give up what two processes must not share. See ``docs/decisions/017-forks.md``.

The copy has the namespace and nothing else that lives: no thread but this one, no child process, no connection. What
it lacks is told by name. Files that are open stay open, each copy at a position of its own.
"""

from __future__ import annotations

import _thread
import contextlib
import fcntl
import gc
import os
import stat
import sys
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

#: Names of what a copy lacks, for people; more of a kind than this are a leak.
_MAX_NAMES = 50
_MAX_NAME_CHARS = 200


def fork() -> bool:
    """Fork a copy that does not end with this process; return whether this is the copy.

    Raises:
        OSError: There is no process, or no memory, to be had.
    """
    state = _random_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads: what they mean for the copy is told by ``not_kept``
        if os.fork():
            return False
    os.setsid()
    gc.freeze()  # what is there now stays shared: looking for garbage in it would copy every page
    if state is not None:
        state[0].setstate(state[1])
    return True


def reap(pids: Iterable[int]) -> None:
    """Take leave of copies that have ended: until then the supervisor may want to know why."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):  # generated code did so, or ignores SIGCHLD
            os.waitpid(pid, os.WNOHANG)


def let_go_of_descriptors(kept: Collection[int]) -> None:
    """Give files a position of their own, and lead whatever else is open into nothing.

    A pipe or a connection that two copies hold would mix what they say, and never end for the other side.

    Args:
        kept: Descriptors that stay as they are.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd, kind in _open_descriptors({*kept, null}):
        with contextlib.suppress(OSError):  # then it stays shared: a file that cannot be opened again by its name
            if kind == stat.S_IFREG:
                _open_anew(fd)
            elif kind not in (stat.S_IFCHR, stat.S_IFDIR):
                os.dup2(null, fd, inheritable=os.get_inheritable(fd))
    os.close(null)


def not_kept(known: Collection[int], children: Collection[int], tasks: int) -> list[str]:
    """Return what a copy of this process lacks, by name.

    Args:
        known: Descriptors of the worker's own.
        children: Its own copies.
        tasks: How many tasks wait in the event loop.
    """
    return [name[:_MAX_NAME_CHARS] for name in _not_kept(known, children, tasks)]


def _not_kept(known: Collection[int], own_children: Collection[int], tasks: int) -> Iterator[str]:
    yield from (f"thread {name!a}" for name in _threads()[:_MAX_NAMES])
    children = [pid for pid in _children() if pid not in own_children]
    yield from (f"child process {pid}" for pid in children[:_MAX_NAMES])
    if tasks:
        yield f"{tasks} asyncio tasks"
    names = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "pipe"}
    others = [
        f"{names.get(kind, 'kernel object')} (descriptor {fd})"
        for fd, kind in _open_descriptors(known)
        if kind not in (stat.S_IFREG, stat.S_IFCHR, stat.S_IFDIR)
    ]
    yield from others[:_MAX_NAMES]


def _threads() -> list[str]:
    main = threading.main_thread()
    named = [thread.name for thread in threading.enumerate() if thread is not main]
    return named + ["unnamed"] * (_thread._count() - len(named))


def _children() -> list[int]:
    with contextlib.suppress(OSError, ValueError), open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]
    return []


def _open_descriptors(without: Collection[int]) -> list[tuple[int, int]]:
    """Return descriptors beside the standard ones, each with its kind as in ``st_mode``."""
    found = []
    for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in without:
            with contextlib.suppress(OSError):  # the one that listed them
                found.append((fd, stat.S_IFMT(os.fstat(fd).st_mode)))
    return found


def _open_anew(fd: int) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    position = os.lseek(fd, 0, os.SEEK_CUR)
    again = os.open(f"/proc/self/fd/{fd}", (flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)) | os.O_CLOEXEC)
    try:
        os.lseek(again, position, os.SEEK_SET)
        os.dup2(again, fd, inheritable=os.get_inheritable(fd))
    finally:
        os.close(again)


def _random_state() -> tuple[Any, Any] | None:
    """Return the module ``random`` and its state: Python seeds it anew in each child, and a copy shall be one."""
    module: Any = sys.modules.get("random")
    try:
        return None if module is None else (module, module.getstate())
    except Exception:  # generated code has put something else in its place
        return None
