"""Files of a session, read and written for the host with the session's own rights. Links are never followed."""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Iterator
from typing import Any

_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

FILE, FOLDER, LINK, OTHER = "file", "folder", "link", "other"


class Refused(Exception):
    """Something is in the way; ``path`` says where."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


def home() -> str:
    """Return the session's folder, where it started and where relative paths begin."""
    return os.environ.get("HOME") or "/tmp"  # noqa: S108


def listing(path: str, max_entries: int) -> dict[str, Any]:
    """Describe a file, or a folder with everything below it.

    Args:
        path: Absolute, or relative to the session's folder.
        max_entries: More than so many are refused.

    Returns:
        ``{"kind", "size", "entries": [[relative path, kind, size in bytes, time of the last change in ns], ...]}``.

    Raises:
        Refused: Too many.
        OSError: It cannot be read.
    """
    root = os.path.join(home(), path)
    status = os.lstat(root)
    entries: list[list[Any]] = []
    if stat.S_ISDIR(status.st_mode):
        for entry in walk(root):
            if len(entries) >= max_entries:
                raise Refused(f"more than {max_entries:,} files and folders", path)
            entries.append(entry)
    return {"kind": kind_of(status), "size": status.st_size, "entries": entries}


def walk(root: str) -> Iterator[list[Any]]:
    """Yield relative path, kind, size and time of everything below a folder, folders before what is in them."""
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(os.path.join(root, folder)) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            relative = os.path.join(folder, entry.name)
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # a thread of the session removed it just now
                continue
            kind = kind_of(status)
            if kind == FOLDER:
                pending.append(relative)
            yield [relative, kind, status.st_size if kind == FILE else 0, status.st_mtime_ns]


def kind_of(status: os.stat_result) -> str:
    """Return what something is."""
    mode = status.st_mode
    return FILE if stat.S_ISREG(mode) else FOLDER if stat.S_ISDIR(mode) else LINK if stat.S_ISLNK(mode) else OTHER


def read(parts: list[list[Any]]) -> str:
    """Read parts of files.

    Args:
        parts: ``[path, offset, length]`` of each, in bytes.

    Returns:
        A line with ``size:end`` of each, where ``end`` is 1 where the file ends there, else 0; then all of the data, in
        base64. One text, because only a text is not shown, at some cost, as its ``repr`` too.
    """
    return spelt([_read(*part) for part in parts])


def spelt(parts: list[tuple[bytes, bool]]) -> str:
    """Return parts of files, each with whether its file ends there, as ``read`` does."""
    sizes = " ".join(f"{len(data)}:{end:d}" for data, end in parts)
    return f"{sizes}\n{base64.b64encode(b''.join(data for data, _ in parts)).decode('ascii')}"


def _read(path: str, offset: int, length: int) -> tuple[bytes, bool]:
    fd = os.open(os.path.join(home(), path), _READ_FLAGS)
    try:
        _require_file(fd, path)
        # One byte more tells whether there is more; a short read before the end would be taken for it.
        pieces, left = [], length + 1
        while left and (piece := os.pread(fd, left, offset)):
            pieces.append(piece)
            left -= len(piece)
            offset += len(piece)
    finally:
        os.close(fd)
    data = b"".join(pieces)
    return data[:length], len(data) <= length


def make_folders(paths: list[str]) -> None:
    """Make folders that are not there yet, with those around them."""
    for path in paths:
        os.makedirs(os.path.join(home(), path), mode=0o700, exist_ok=True)


def write(parts: list[list[Any]], token: str) -> None:
    """Write parts of files; each file appears, whole, under its name once its last part is there.

    Args:
        parts: ``[path, offset, data, last, executable]`` of each.
        token: Tells this transfer's unfinished files apart from all others.
    """
    for part in parts:
        _write(*part, token=token)


def _write(path: str, offset: int, data: bytes, last: bool, executable: bool, *, token: str) -> None:
    full = os.path.join(home(), path)
    if os.path.isdir(full) and not os.path.islink(full):
        raise Refused("a folder of that name is in the way", path)
    unfinished = os.path.join(os.path.dirname(full), f".{token}.part")
    os.makedirs(os.path.dirname(full), mode=0o700, exist_ok=True)
    fd = os.open(unfinished, _WRITE_FLAGS | (os.O_EXCL if not offset else 0), 0o600)
    try:
        _require_file(fd, path)
        _write_all(fd, data, offset)
        if last and executable:
            os.fchmod(fd, 0o700)
    except BaseException:
        os.unlink(unfinished)  # or a full /tmp would stay full
        raise
    finally:
        os.close(fd)
    if last:
        os.replace(unfinished, full)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _require_file(fd: int, path: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise Refused("it is no regular file", path)
