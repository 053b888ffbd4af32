"""Files and folders between this machine and a session: ``interpreter.files``."""

from __future__ import annotations

import dataclasses
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from host_client.aside import Aside
from host_client.errors import FileRefused
from host_client.file_targets import Target, new_target
from host_client.masking import Masker
from host_client.session_paths import Entry, read_listing, read_parts, session_path

#: What one step carries: large enough that the step itself costs little, small enough for any sandbox's memory.
CHUNK_BYTES = 4 << 20
#: What one transfer may move unless its caller says otherwise; a session's ``/tmp`` is of this size by default.
DEFAULT_MAX_BYTES = 256 << 20
#: Files and folders of one transfer.
MAX_ENTRIES = 10_000
#: Small files that share a step; a request of so many paths is still small.
_MAX_BATCH = 500

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """What ``SessionFiles`` needs of an open session, for as long as one transfer takes."""

    aside: Aside
    masker: Masker


class SessionFiles:
    """Puts and gets files of a session while no code runs in it.

    Paths in the session are relative to the folder that it started in (``$HOME`` there), or begin with ``/tmp/``.
    Links and devices are refused, on both sides. Secrets of the session are masked in what is got.

    Args:
        connect: Opens the session and keeps other executions off.
    """

    def __init__(self, connect: Callable[[], AbstractContextManager[Link]]) -> None:
        self._connect = connect

    def put(
        self, host_path: str | os.PathLike[str], path: str | None = None, *, max_bytes: int = DEFAULT_MAX_BYTES
    ) -> None:
        """Copy a file or a folder into the session; files that are there are replaced.

        Args:
            host_path: A regular file or a folder; one that is named by a link is followed, links inside are refused.
            path: What it is called in the session; by default as here.
            max_bytes: More than this is refused before anything is copied.

        Raises:
            FileRefused: A link, a device, too much, or a path that leaves the session; ``path`` says which.
            SessionBusy: Code is running.
            SandboxError: What an execution raises.
        """
        source = Path(os.path.realpath(host_path))
        root = session_path(Path(host_path).absolute().name if path is None else path)
        found = list(_host_entries(source, max_bytes))
        with self._connect() as link:
            folders = [_joined(root, entry.path) for entry in found if entry.kind == "folder"]
            if folders:
                link.aside.ask("folders", paths=folders)
            _send(link.aside, source, root, [entry for entry in found if entry.kind == "file"])

    def get(self, path: str, host_path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        """Copy a file or a folder out of the session. It appears on the host complete, or not at all.

        Args:
            path: In the session.
            host_path: What it is called here. A file there is replaced; a folder must not be there yet.
            max_bytes: More than this is refused.

        Raises:
            FileRefused: A link, a device, a name that leads elsewhere, too much, no such file, or the target is in
                the way; ``path`` says which. Nothing was written.
            SessionBusy: Code is running.
            MalformedReply: The session lied about it; nothing was written.
            SandboxError: What an execution raises.
        """
        wanted = session_path(path)
        with self._connect() as link:
            get_through(link, wanted, Path(host_path), max_bytes=max_bytes)

    def read(self, path: str, *, max_bytes: int = DEFAULT_MAX_BYTES) -> bytes:
        """Return the content of one file of the session.

        Raises:
            FileRefused, SessionBusy, MalformedReply, SandboxError: As ``get``.
        """
        wanted = session_path(path)
        with self._connect() as link:
            content = b"".join(_chunks(link.aside, wanted, max_bytes))
            return bytes(link.masker.value(content))

    def list(self, path: str = ".") -> list[Entry]:
        """Return everything below a folder of the session, or the one file; links and devices too.

        Raises:
            FileRefused: There is nothing, or there are too many.
            SessionBusy, MalformedReply, SandboxError: As ``get``.
        """
        wanted = session_path(path)
        with self._connect() as link:
            root, entries = _listing(link, wanted)
        return entries if root.kind == "folder" else [dataclasses.replace(root, path=os.path.basename(wanted))]


def get_through(link: Link, wanted: str, target: Path, *, max_bytes: int) -> None:
    """Do what ``SessionFiles.get`` does, through a link that is open already, with a path that was checked."""
    root, entries = _listing(link, wanted)
    _require_regular([root, *entries], wanted, max_bytes)
    with new_target(target, folder=root.kind == "folder") as made:
        _receive(link, wanted, [root] if root.kind == "file" else entries, made, max_bytes)


def _listing(link: Link, path: str) -> tuple[Entry, list[Entry]]:
    return read_listing(path, link.aside.ask("list", path=path, max_entries=MAX_ENTRIES), MAX_ENTRIES)


def _joined(root: str, path: str) -> str:
    return f"{root}/{path}" if path else root


def _host_entries(source: Path, max_bytes: int) -> Iterator[Entry]:
    """Yield what is at a path of the host, relative to it.

    Raises:
        FileRefused: Something that is no regular file or folder, too much, or too many.
    """
    total, count = 0, 0
    pending = [""]
    while pending:
        relative = pending.pop()
        path = source / relative
        entry = _host_entry(path, relative)
        count, total = count + 1, total + (entry.size_bytes if entry.kind == "file" else 0)
        if count > MAX_ENTRIES:
            raise FileRefused(f"more than {MAX_ENTRIES:,} files and folders", path=str(source))
        if total > max_bytes:
            raise FileRefused(f"more than {max_bytes:,} bytes", path=str(source), help="max_bytes= allows more")
        yield entry
        if entry.kind == "folder":
            try:
                pending += sorted((os.path.join(relative, name) for name in os.listdir(path)), reverse=True)
            except OSError as error:
                raise FileRefused(error.strerror or str(error), path=str(path)) from None


def _host_entry(path: Path, relative: str) -> Entry:
    try:
        status = path.lstat()
    except OSError as error:
        raise FileRefused(error.strerror or str(error), path=str(path)) from None
    if stat.S_ISDIR(status.st_mode):
        return Entry(path=relative, kind="folder", size_bytes=0)
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise FileRefused(f"it is {kind}; only regular files and folders are put into a session", path=str(path))
    return Entry(path=relative, kind="file", size_bytes=status.st_size)


def _send(aside: Aside, source: Path, root: str, entries: list[Entry]) -> None:
    """Send files in steps of at most a chunk; small ones share a step."""
    token = secrets.token_hex(8)
    batch: list[list[Any]] = []
    size = 0
    for entry in entries:
        for offset, data, last, executable in _parts(source / entry.path):
            if batch and size + len(data) > CHUNK_BYTES:
                aside.ask("write", parts=batch, token=token)
                batch, size = [], 0
            batch.append([_joined(root, entry.path), offset, data, last, executable])
            size += len(data)
    if batch:
        aside.ask("write", parts=batch, token=token)


def _parts(path: Path) -> Iterator[tuple[int, bytes, bool, bool]]:
    """Yield offset, data, whether it is the last, and whether the file may be executed."""
    try:
        fd = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        raise FileRefused(error.strerror or str(error), path=str(path)) from None
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise FileRefused("it is no regular file any more", path=str(path))
        executable = bool(status.st_mode & stat.S_IXUSR)
        offset, data = 0, file.read(CHUNK_BYTES)
        # One that grows while it is read is sent as long as it was.
        while offset + len(data) < status.st_size and data:
            yield offset, data, False, executable
            offset, data = offset + len(data), file.read(min(CHUNK_BYTES, status.st_size - offset - len(data)))
        yield offset, data, True, executable


def _require_regular(entries: list[Entry], wanted: str, max_bytes: int) -> None:
    for entry in entries:
        if entry.kind not in ("file", "folder"):
            kind = "a link" if entry.kind == "link" else "no regular file"
            raise FileRefused(f"it is {kind}; only regular files and folders are got", path=_joined(wanted, entry.path))
    if sum(entry.size_bytes for entry in entries if entry.kind == "file") > max_bytes:
        raise FileRefused(f"more than {max_bytes:,} bytes", path=wanted, help="max_bytes= allows more")


def _receive(link: Link, root: str, entries: list[Entry], target: Target, max_bytes: int) -> None:
    for entry in entries:
        if entry.kind == "folder":
            target.make_folder(entry.path)
    left = max_bytes
    for batch in _batches([entry for entry in entries if entry.kind == "file"]):
        wanted = [(_joined(root, entry.path), 0, min(entry.size_bytes, CHUNK_BYTES)) for entry in batch]
        for entry, (path, _, _), (data, end) in zip(batch, wanted, _ask(link.aside, wanted), strict=True):
            left -= len(data)
            with target.open(entry.path) as file:
                file.write(data)
                for more in () if end else _chunks(link.aside, path, left, offset=len(data)):
                    file.write(more)
                    left -= len(more)
                if link.masker:
                    _mask(file, link.masker)


def _batches(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Yield files whose first parts fit into one step."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        part = min(entry.size_bytes, CHUNK_BYTES)
        if batch and (size + part > CHUNK_BYTES or len(batch) >= _MAX_BATCH):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += part
    if batch:
        yield batch


def _ask(aside: Aside, wanted: list[tuple[str, int, int]]) -> list[tuple[bytes, bool]]:
    return read_parts(aside.ask("read", parts=wanted), [length for _, _, length in wanted])


def _chunks(aside: Aside, path: str, most: int, *, offset: int = 0) -> Iterator[bytes]:
    """Yield a file of the session from ``offset`` on.

    Raises:
        FileRefused: There are more than ``most`` bytes.
    """
    left, end = most, False
    while not end:
        [(data, end)] = _ask(aside, [(path, offset, min(CHUNK_BYTES, left))])
        offset, left = offset + len(data), left - len(data)
        if not end and left <= 0:
            raise FileRefused(f"more than {offset:,} bytes", path=path, help="max_bytes= allows more")
        yield data


def _mask(file: Any, masker: Masker) -> None:
    """Mask the secrets of a file that is complete; one may lie across two chunks."""
    file.seek(0)
    content = file.read()
    masked = masker.value(content)
    if masked is not content:
        file.seek(0)
        file.truncate()
        file.write(masked)
