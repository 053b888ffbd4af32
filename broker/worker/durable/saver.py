"""Saves the namespace from a forked process, so that saving changes nothing in the session, whatever runs on the way.

The host asks in steps: ``start``, ``wait`` until there is a report, ``part`` by part the file, ``end``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import select
import signal
import sys
import tempfile
import time
import warnings
from typing import Any

from broker.worker import files
from broker.worker.display import safe_str, type_name
from broker.worker.durable.pickling import pickler_class
from broker.worker.durable.writing import write

_PROGRESS_BYTES = 4096
_READ_BYTES = 64 << 10
#: Names and reasons of a hundred thousand variables fit.
_MAX_REPORT_BYTES = 32 << 20
#: Python frames and levels of the pickler: a linked list of some thousand nodes can be saved.
_RECURSION_LIMIT = 20_000


@dataclasses.dataclass(slots=True)
class _Saving:
    """One save that is under way.

    Attributes:
        fd: The file.
        news: Where the child's report is read.
        progress: The variable that the child is at.
        pid: The child, or 0 once it was reaped.
        report: What was read of the report.
    """

    fd: int
    news: int
    progress: mmap.mmap
    pid: int
    report: bytearray = dataclasses.field(default_factory=bytearray)


#: State of the process, which is one session's.
_current: _Saving | None = None


def start(namespace: dict[str, Any], secrets: list[str], wait_s: float) -> dict[str, Any]:
    """Begin to save; one that was under way is given up.

    Args:
        namespace: The session's.
        secrets: Environment variables whose values must not get into the file.
        wait_s: See ``wait``.

    Returns:
        As ``wait``; ``{"missing": "cloudpickle"}`` where the image lacks what this takes.
    """
    global _current
    end()
    try:
        pickler_class()  # imported here once, and not by each child
    except ImportError:
        return {"missing": "cloudpickle"}
    values = {name: os.environ[name] for name in secrets if name in os.environ}
    fd = _new_file()
    progress = mmap.mmap(-1, _PROGRESS_BYTES)
    news, report = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the child does without
        pid = os.fork()
    if pid == 0:
        _run_child(namespace, values, fd, report, progress)
    os.close(report)
    _current = _Saving(fd, news, progress, pid)
    return wait(wait_s)


def wait(wait_s: float) -> dict[str, Any]:
    """Wait for the report.

    Args:
        wait_s: At most so long, in seconds.

    Returns:
        ``{"report": ...}``, or ``{"at": variable}`` while there is none yet.
    """
    saving = _require()
    until = time.monotonic() + wait_s
    while select.select([saving.news], [], [], max(0.0, until - time.monotonic()))[0]:
        data = os.read(saving.news, _READ_BYTES)
        saving.report += data
        if not data or len(saving.report) > _MAX_REPORT_BYTES:
            return {"report": _report(saving)}
    return {"at": _at(saving)}


def part(offset: int, length: int) -> str:
    """Return a part of the file, spelt as ``files.read`` does."""
    saving = _require()
    data = b""
    while len(data) < length and (piece := os.pread(saving.fd, length - len(data), offset + len(data))):
        data += piece
    return files.spelt([(data, offset + len(data) >= os.fstat(saving.fd).st_size)])


def end() -> None:
    """Let go of everything; idempotent."""
    global _current
    saving, _current = _current, None
    if saving is not None:
        _reap(saving)
        os.close(saving.fd)
        os.close(saving.news)
        saving.progress.close()


def _require() -> _Saving:
    if _current is None:
        raise files.Refused("nothing is being saved", "")
    return _current


def _new_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("rlm-sandbox-saved", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _report(saving: _Saving) -> dict[str, Any]:
    status = _reap(saving)
    try:
        report = json.loads(saving.report)
    except ValueError:
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        report = {"failed": f"the process that saves {how} at the variable {_at(saving)!r}"}
    return dict(report)


def _reap(saving: _Saving) -> int:
    """Make sure that the child has ended; return how: one that is ending by itself has its status by now."""
    pid, saving.pid = saving.pid, 0
    if not pid:
        return 0
    try:
        os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except (ProcessLookupError, ChildProcessError):  # generated code waits for all children, or ignores their ends
        return 0


def _at(saving: _Saving) -> str:
    return bytes(saving.progress[:]).rstrip(b"\0").decode("utf-8", "replace")


def _run_child(namespace: dict[str, Any], secrets: dict[str, str], fd: int, report: int, progress: mmap.mmap) -> None:
    """Save, report and end; never returns."""
    status = 1
    try:
        _let_go(keep={fd, report})

        def announce(name: str) -> None:
            shown = name.encode("utf-8", "replace")[:_PROGRESS_BYTES]
            progress[:] = shown.ljust(_PROGRESS_BYTES, b"\0")

        try:
            found = write(namespace, fd, secrets, announce)
        except BaseException as error:
            found = {"failed": f"{type_name(type(error))}: {safe_str(error)}"[:500]}
        with open(report, "wb") as file:
            file.write(json.dumps(found).encode("ascii"))
        status = 0
    finally:
        os._exit(status)


def _let_go(keep: set[int]) -> None:
    """Give up what the session's own process uses: its output, its files, its interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - keep - {0, 1, 2}:
        with contextlib.suppress(OSError):  # the one that listed them
            os.close(fd)
    sys.settrace(None)
    sys.setprofile(None)
    sys.setrecursionlimit(max(sys.getrecursionlimit(), _RECURSION_LIMIT))
