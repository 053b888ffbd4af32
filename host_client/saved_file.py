"""The file that a saved session is kept in. What generated code made of it, the payload, is never read here.

::

    64 bytes: magic, format, sizes of payload and header, SHA-256 of the header
    payload:  made and read by the sandbox alone
    header:   JSON, with the payload's SHA-256

Everything that is read from it counts as hostile: somebody may have changed the file since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from broker.protocol import limits
from host_client.errors import DiskFull, SavedFileDamaged, SavedFileNewer, SaveFailed

MAGIC = b"\x93RLMSAVE"
#: Counts changes that an older version of this package could not read.
FORMAT = 1
_PREFIX = struct.Struct("<8sIIQQ32s")
_MAX_HEADER_BYTES = 32 << 20
_MAX_NAMES = 100_000
_MAX_TEXT_CHARS = 1_000
_CHUNK_BYTES = 4 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One variable of a saved session.

    Attributes:
        name: In the session.
        type: Its class's name.
        size_bytes: What it takes in the file; what it shares counts for the variable that came first.
    """

    name: str
    type: str
    size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What is known of a saved session without looking into its payload.

    Attributes:
        made_at: When, in ISO 8601.
        version: Of this package, which made it.
        python: Of the sandbox, such as ``3.13.5``.
        packages: Versions of what the payload needs, by name.
        variables: What is in it.
        not_saved: Why each other variable is not, by name.
        payload_bytes: Size of the payload.
        payload_sha256: Its digest, in hexadecimal digits.
    """

    made_at: str
    version: str
    python: str
    packages: dict[str, str]
    variables: tuple[Variable, ...]
    not_saved: dict[str, str]
    payload_bytes: int
    payload_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        names = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**names, "variables": [[each.name, each.type, each.size_bytes] for each in self.variables]}

    @classmethod
    def from_json(cls, data: Any) -> Header:
        """Read it.

        Raises:
            ValueError, TypeError, KeyError: It is none.
        """
        if not isinstance(data, dict):
            raise TypeError("header")
        return cls(
            made_at=text(data["made_at"]),
            version=text(data["version"]),
            python=text(data["python"]),
            packages=texts(data["packages"]),
            variables=variables(data["variables"]),
            not_saved=texts(data["not_saved"]),
            payload_bytes=natural(data["payload_bytes"]),
            payload_sha256=text(data["payload_sha256"]),
        )


def text(value: Any) -> str:
    """Return a short text that is safe to show, or raise ValueError."""
    if type(value) is not str or len(value) > _MAX_TEXT_CHARS:
        raise ValueError("text")
    return value if value.isprintable() else ascii(value)[1:-1]


def texts(value: Any) -> dict[str, str]:
    """Return texts by name, or raise ValueError."""
    if type(value) is not dict or len(value) > _MAX_NAMES:
        raise ValueError("texts")
    return {text(name): text(item) for name, item in value.items()}


def natural(value: Any) -> int:
    """Return a number of bytes, or raise ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError("number")
    return value


def variables(value: Any) -> tuple[Variable, ...]:
    """Return variables, or raise ValueError."""
    if type(value) is not list or len(value) > _MAX_NAMES or any(type(i) is not list or len(i) != 3 for i in value):
        raise ValueError("variables")
    return tuple(Variable(name=text(n), type=text(kind), size_bytes=natural(size)) for n, kind, size in value)


class NewFile:
    """A file that is being written; see ``new_file``."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0
        file.write(bytes(_PREFIX.size))

    def write(self, data: bytes) -> None:
        """Append a part of the payload."""
        self._digest.update(data)
        self._size += len(data)
        self._file.write(data)

    def finish(self, **fields: Any) -> int:
        """Write the header, the other fields of which are given; return the file's size in bytes."""
        made = Header(payload_bytes=self._size, payload_sha256=self._digest.hexdigest(), **fields)
        header = json.dumps(made.to_json()).encode("ascii")
        self._file.write(header)
        self._file.seek(0)
        self._file.write(_PREFIX.pack(MAGIC, FORMAT, 0, self._size, len(header), hashlib.sha256(header).digest()))
        return _PREFIX.size + self._size + len(header)


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[NewFile]:
    """Write beside ``path``, and move it there at the end of the ``with`` if nothing was raised; only we may read it.

    Raises:
        SaveFailed: Something is there already, or it cannot be written.
        DiskFull: There is no room.
    """
    require_free(path, overwrite=overwrite)
    try:
        fd, unfinished = tempfile.mkstemp(prefix=".rlm-sandbox-", dir=path.parent)
        try:
            with open(fd, "w+b") as file:
                yield NewFile(file)
                file.flush()
                os.fsync(fd)
            _put(unfinished, path, overwrite=overwrite)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished)
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(f"{path}: {error.strerror}; the session was not saved") from error
        raise SaveFailed(f"it cannot be written: {error.strerror or error}", path=str(path)) from error


def require_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a path where something is that is not to be replaced.

    Raises:
        SaveFailed: It is.
    """
    if path.is_dir():
        raise SaveFailed("there is a folder of that name; name the file", path=str(path))
    if not overwrite and os.path.lexists(path):
        raise SaveFailed("there is a file already", path=str(path), help="save(path, overwrite=True) replaces it")


def _put(unfinished: str, path: Path, *, overwrite: bool) -> None:
    if overwrite:
        os.replace(unfinished, path)
    else:
        try:
            os.link(unfinished, path)  # unlike a rename, it never replaces what somebody put there meanwhile
        except FileExistsError:
            require_free(path, overwrite=False)
            raise
        except OSError:  # a file system without links
            require_free(path, overwrite=False)
            os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # not every file system can; the file itself is safe
        os.fsync(folder)
    os.close(folder)


class SavedFile:
    """A saved session's file, open to be read.

    Attributes:
        path: Where it is.
        header: What it says of itself; it was checked to be whole, not to be true.
        size: Of the file, in bytes.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.header = self._read_header()

    def chunks(self) -> Iterator[bytes]:
        """Yield the payload.

        Raises:
            SavedFileDamaged: At the end: it is not what was saved.
        """
        self._file.seek(_PREFIX.size)
        digest, left = hashlib.sha256(), self.header.payload_bytes
        while left:
            data = self._file.read(min(left, _CHUNK_BYTES))
            if not data:
                raise self._damaged("it was cut off")
            digest.update(data)
            left -= len(data)
            yield data
        if digest.hexdigest() != self.header.payload_sha256:
            raise self._damaged("its content is not what was saved")

    def _read_header(self) -> Header:
        start = self._file.read(_PREFIX.size)
        if not start.startswith(MAGIC):
            raise self._damaged("it is no saved session")
        if len(start) < _PREFIX.size:
            raise self._damaged("it was cut off")
        _, found_format, reserved, payload_bytes, header_bytes, digest = _PREFIX.unpack(start)
        if found_format != FORMAT:
            raise SavedFileNewer(
                f"it has format {found_format}, and this version of rlm-sandbox reads format {FORMAT}",
                path=str(self.path),
                help="restore it with the version that saved it, or a newer one",
            )
        if reserved or header_bytes > _MAX_HEADER_BYTES or self.size != _PREFIX.size + payload_bytes + header_bytes:
            raise self._damaged(f"it has {self.size:,} bytes, and its beginning says otherwise")
        self._file.seek(_PREFIX.size + payload_bytes)
        data = self._file.read(header_bytes)
        if hashlib.sha256(data).digest() != digest:
            raise self._damaged("its header is not what was saved")
        try:
            header = Header.from_json(_parsed(data))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._damaged("its header is none") from None
        if header.payload_bytes != payload_bytes:
            raise self._damaged("its header contradicts itself")
        return header

    def _damaged(self, message: str) -> SavedFileDamaged:
        return SavedFileDamaged(message, path=str(self.path), help="save the session again, or use another copy")


def _parsed(data: bytes) -> Any:
    def no_numbers(text: str) -> Any:
        raise ValueError(text)

    if data.count(b"[") + data.count(b"{") > limits.MAX_JSON_CONTAINERS:
        raise ValueError("containers")
    return json.loads(data, parse_int=_short_int, parse_float=no_numbers, parse_constant=no_numbers)


def _short_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(digits)
    return int(digits)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[SavedFile]:
    """Open a saved session's file.

    Raises:
        SavedFileDamaged: It cannot be read, is no such file, was cut off or changed.
        SavedFileNewer: It is of a newer version.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SavedFileDamaged(f"it cannot be read: {error.strerror}", path=str(path)) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SavedFileDamaged("it is no regular file", path=str(path))
    with open(fd, "rb") as file:
        yield SavedFile(path, file)
