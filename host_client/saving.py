"""Saves a session to a file and restores it; ``broker/worker/durable`` is the other side.

The host copies bytes and keeps the book. What the session says of itself is shown and written down, never believed.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from broker import __version__
from host_client.aside import Aside
from host_client.errors import (
    FileRefused,
    MalformedReply,
    RestoreFailed,
    SandboxError,
    SavedFileMismatch,
    SaveFailed,
)
from host_client.files import CHUNK_BYTES, Link
from host_client.masking import Masker
from host_client.saved_file import NewFile, SavedFile, Variable, natural, new_file, text, texts, variables
from host_client.session_paths import read_parts

#: One step of waiting; shorter than ``STEP_TIMEOUT_S``, which is for steps that are stuck.
_WAIT_S = 20.0
#: A session's memory is smaller, but a file can claim any size.
_MAX_BYTES = 16 << 30
_MORE_MEMORY = "give the sandbox more memory, SandboxSettings(memory='4g'), or delete what need not be saved"
_GET_CLOUDPICKLE = "the image needs the package cloudpickle: SandboxSettings(packages=('cloudpickle',)), or make image"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession:
    """A session that was saved to a file.

    Attributes:
        path: The file.
        size: Of the file, in bytes.
        saved: Names of the variables in it.
        not_saved: Why each other variable is not in it, by name.
        python: Version of the sandbox's Python.
        packages: Versions of the packages that restoring it takes, by name.
    """

    path: Path
    size: int
    saved: tuple[str, ...]
    not_saved: dict[str, str]
    python: str
    packages: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RestoredSession:
    """A session that was restored from a file.

    Attributes:
        path: The file.
        restored: Names of the variables that the session has now.
        not_saved: Why each other variable of the saved session is not in the file, by name.
        not_restored: Why a variable that is in the file could not be restored, by name.
        python: Version of Python that it was saved with.
        packages: Versions of packages that it was saved with, by name.
    """

    path: Path
    restored: tuple[str, ...]
    not_saved: dict[str, str]
    not_restored: dict[str, str]
    python: str
    packages: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    saved: tuple[Variable, ...]
    not_saved: dict[str, str]
    packages: dict[str, str]
    python: str
    size: int

    @classmethod
    def from_json(cls, data: Any) -> _Report:
        return cls(
            saved=variables(data["saved"]),
            not_saved=texts(data["not_saved"]),
            packages=texts(data["packages"]),
            python=text(data["python"]),
            size=natural(data["size"]),
        )


class _Deadline:
    """What is left of the time that all steps together may take; None for any."""

    def __init__(self, timeout_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._timeout_s = clock, timeout_s
        self._ends_at = None if timeout_s is None else clock() + timeout_s

    def step_s(self) -> float:
        """Return how long the next step may wait, in seconds."""
        return _WAIT_S if self._ends_at is None else max(0.0, min(_WAIT_S, self._ends_at - self._clock()))

    @property
    def over(self) -> str | None:
        """Say that it is over, if so."""
        if self._ends_at is None or self._clock() < self._ends_at:
            return None
        return f"it took longer than execution_timeout_s={self._timeout_s:g}"


def save_session(link: Link, path: Path, *, overwrite: bool, timeout_s: float | None) -> SavedSession:
    """Save the namespace of a session; see ``SandboxInterpreter.save``.

    Args:
        link: To the session, which runs nothing else meanwhile.
        path: The file.
        overwrite: Whether one that is there is replaced.
        timeout_s: Deadline in seconds.

    Raises:
        SaveFailed, DiskFull: Nothing was written.
        SandboxError: What an execution raises.
    """
    deadline = _Deadline(timeout_s)
    with new_file(path, overwrite=overwrite) as file:
        try:
            report = _report(link, path, deadline)
            for data in _unmasked(_payload(link.aside, path, report.size, deadline), link.masker, path):
                file.write(data)
        except (MalformedReply, FileRefused) as error:
            raise SaveFailed(error.message, path=str(path), help="the session is as it was") from error
        finally:
            _quietly(link.aside, "end")
        size = _finish(file, report)
    return SavedSession(
        path=path,
        size=size,
        saved=tuple(each.name for each in report.saved),
        not_saved=report.not_saved,
        python=report.python,
        packages=report.packages,
    )


def restore_session(link: Link, saved: SavedFile, *, ignore_versions: bool, timeout_s: float | None) -> RestoredSession:
    """Replace the namespace of a session by a saved one; see ``SandboxInterpreter.restore``.

    Args:
        link: To the session, which runs nothing else meanwhile.
        saved: The file.
        ignore_versions: Whether packages of other versions will do.
        timeout_s: Deadline in seconds.

    Raises:
        SavedFileMismatch, SavedFileDamaged, RestoreFailed: The session is as it was.
        SandboxError: What an execution raises.
    """
    deadline = _Deadline(timeout_s)
    try:
        _check_versions(link.aside, saved, ignore_versions=ignore_versions)
        answer = _load(link.aside, saved, deadline, tolerant=False)
        if "problem" in answer:  # something in it fails; the slower way finds out what
            answer = _load(link.aside, saved, deadline, tolerant=True)
        if "problem" in answer:
            raise RestoreFailed(f"{text(answer['problem'])}; the session is as it was", path=str(saved.path))
        return _restored(saved, answer)
    except (MalformedReply, FileRefused, ValueError, TypeError, KeyError) as error:
        why = error.message if isinstance(error, SandboxError) else "the session gave no account of it"
        raise RestoreFailed(why, path=str(saved.path), help="the session has the variables that it had") from error
    finally:
        _quietly(link.aside, "restore")


def _report(link: Link, path: Path, deadline: _Deadline) -> _Report:
    answer = link.aside.ask("save", secrets=link.masker.names, wait_s=deadline.step_s())
    while True:
        if not isinstance(answer, dict):
            raise MalformedReply("the session gave no account of what it saved")
        if "missing" in answer:
            raise SaveFailed("the sandbox cannot save sessions", path=str(path), help=_GET_CLOUDPICKLE)
        if "report" in answer:
            return _read_report(answer["report"], path)
        if (over := deadline.over) is not None:
            raise SaveFailed(f"{over}, and was at the variable {str(answer.get('at'))[:200]!r}", path=str(path))
        answer = link.aside.ask("saving", step="wait", wait_s=deadline.step_s())


def _read_report(report: Any, path: Path) -> _Report:
    try:
        if "failed" in report:
            raise SaveFailed(text(report["failed"]), path=str(path), help=_MORE_MEMORY)
        read = _Report.from_json(report)
    except (ValueError, TypeError, KeyError):
        raise MalformedReply("the session gave no account of what it saved") from None
    if read.size > _MAX_BYTES:
        raise SaveFailed(f"the session claims {read.size:,} bytes", path=str(path), help=_MORE_MEMORY)
    return read


def _payload(aside: Aside, path: Path, size: int, deadline: _Deadline) -> Iterator[bytes]:
    offset = 0
    while offset < size:
        if (over := deadline.over) is not None:
            raise SaveFailed(over, path=str(path))
        wanted = min(CHUNK_BYTES, size - offset)
        [(data, _)] = read_parts(aside.ask("saving", step="part", offset=offset, length=wanted), [wanted])
        if len(data) != wanted:
            raise MalformedReply("the session gave less than it had announced")
        offset += wanted
        yield data


def _unmasked(payload: Iterator[bytes], masker: Masker, path: Path) -> Iterator[bytes]:
    """Pass a payload on in which no secret is found; the session looked already, but it may lie.

    Raises:
        SaveFailed: There is one.
    """
    tail = b""
    for data in payload:
        if masker:
            seen = tail + data
            if (name := masker.found_in(seen)) is not None:
                raise SaveFailed(
                    f"it would hold the secret {name}", path=str(path), help="delete the variables that hold it first"
                )
            tail = seen[-masker.longest_bytes :]
        yield data


def _finish(file: NewFile, report: _Report) -> int:
    return file.finish(
        made_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        version=__version__,
        python=report.python,
        packages=report.packages,
        variables=report.saved,
        not_saved=report.not_saved,
    )


def _quietly(aside: Aside, step: str) -> None:
    """Let the session forget what it holds of this; one that is lost has nothing any more."""
    try:
        aside.ask("saving", step=step)
    except SandboxError:
        return


def _check_versions(aside: Aside, saved: SavedFile, *, ignore_versions: bool) -> None:
    header = saved.header
    found = aside.ask("saving", step="versions", packages=list(header.packages))
    python, there = text(found["python"]), texts(found["packages"])
    if not found["can"]:
        raise RestoreFailed("the sandbox cannot restore sessions", path=str(saved.path), help=_GET_CLOUDPICKLE)
    if _minor(python) != _minor(header.python):
        raise SavedFileMismatch(
            f"it was saved with Python {header.python}, and this sandbox has {python}: functions are kept as that "
            "version's bytecode",
            path=str(saved.path),
            differs={"python": (header.python, python)},
            help=f"restore it in a sandbox with Python {_minor(header.python)}",
        )
    differs = {
        name: (version, there.get(name, "")) for name, version in header.packages.items() if there.get(name) != version
    }
    if differs and not ignore_versions:
        each = ", ".join(f"{name} {was} (here {here or 'missing'})" for name, (was, here) in differs.items())
        raise SavedFileMismatch(
            f"it was saved with {each}",
            path=str(saved.path),
            differs=differs,
            help="restore(path, ignore_versions=True) tries all the same; SandboxSettings(packages=) chooses versions",
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _load(aside: Aside, saved: SavedFile, deadline: _Deadline, *, tolerant: bool) -> dict[str, Any]:
    aside.ask("saving", step="restore")
    for data in saved.chunks():
        if (over := deadline.over) is not None:
            raise RestoreFailed(f"{over}; the session is as it was", path=str(saved.path))
        aside.ask("saving", step="restore_part", data=data)
    answer = aside.ask("restore", tolerant=tolerant)
    if not isinstance(answer, dict):
        raise MalformedReply("the session gave no account of what it restored")
    return answer


def _restored(saved: SavedFile, answer: dict[str, Any]) -> RestoredSession:
    names = answer["restored"]
    if not isinstance(names, list):
        raise TypeError("restored")
    header = saved.header
    return RestoredSession(
        path=saved.path,
        restored=tuple(text(name) for name in names),
        not_saved=header.not_saved,
        not_restored=texts(answer["failed"]),
        python=header.python,
        packages=header.packages,
    )
