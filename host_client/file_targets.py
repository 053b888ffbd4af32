"""Where files from a session are written on the host: complete or not at all, and nowhere else."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from host_client.errors import FileRefused

_NEW_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Target(Protocol):
    """Takes what is got; paths were checked to be relative and to lead nowhere else."""

    def make_folder(self, path: str) -> None:
        """Make a folder."""

    def open(self, path: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open a new file to write and read."""


class _File:
    """One file, unfinished."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def make_folder(self, path: str) -> None:
        raise FileRefused("it is no folder", path=path)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        yield self._file


class _Folder:
    """A folder that only we have written to, so that nothing in it is a link."""

    def __init__(self, root: str) -> None:
        self._root = root

    def make_folder(self, path: str) -> None:
        with _naming(path):
            os.mkdir(os.path.join(self._root, path))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        with _naming(path):
            fd = os.open(os.path.join(self._root, path), _NEW_FLAGS, 0o666)
        with cast("BinaryIO", open(fd, "w+b")) as file, _naming(path):
            yield file


@contextlib.contextmanager
def new_target(path: Path, *, folder: bool) -> Iterator[Target]:
    """Write to a place beside ``path``, and move it there at the end of the ``with`` if nothing was raised.

    Args:
        path: A file there is replaced, and a link there itself, not what it leads to; a folder is refused.
        folder: Whether it will be one.

    Raises:
        FileRefused: Something is in the way, or cannot be written.
    """
    if path.is_dir() and not path.is_symlink():
        raise FileRefused("there is a folder of that name; name what is to be made", path=str(path))
    if folder and os.path.lexists(path):
        raise FileRefused("there is a file of that name, where a folder is to be made", path=str(path))
    with _naming(str(path)):
        if folder:
            yield from _folder(path)
        else:
            yield from _file(path)


def _file(path: Path) -> Iterator[Target]:
    fd, unfinished = tempfile.mkstemp(prefix=".rlm-sandbox-", dir=path.parent)
    try:
        with cast("BinaryIO", open(fd, "w+b")) as file:
            yield _File(file)
            os.fchmod(fd, 0o666 & ~_umask())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise


def _folder(path: Path) -> Iterator[Target]:
    unfinished = tempfile.mkdtemp(prefix=".rlm-sandbox-", dir=path.parent)
    try:
        yield _Folder(unfinished)
        os.chmod(unfinished, 0o777 & ~_umask())
        os.rename(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _umask() -> int:
    """Return the umask, which can only be read by setting it; where the kernel tells it, nothing is set."""
    with (
        contextlib.suppress(OSError, ValueError),
        open("/proc/self/status", encoding="ascii", errors="replace") as lines,
    ):
        for line in lines:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn errors of the file system into ours."""
    try:
        yield
    except OSError as error:
        raise FileRefused(error.strerror or str(error), path=path) from error
