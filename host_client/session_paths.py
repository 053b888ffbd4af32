"""Paths of a session, and what a session says of its files: names that are safe to use here, or an error."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from typing import Any

from host_client.errors import FileRefused, MalformedReply

_PART = re.compile(r"([0-9]{1,12}):([01])")
_KINDS = ("file", "folder", "link", "other")
_MAX_PATH_CHARS = 4_000
_MAX_NAME_BYTES = 255
#: A folder of the session that every path may name; everything else it could name is the image's.
_ALSO = "/tmp/"  # noqa: S108


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder of a session.

    Attributes:
        path: Relative to the folder that was asked for; parts are separated by ``/``.
        kind: ``file``, ``folder``, ``link`` or ``other``.
        size_bytes: Of a file.
    """

    path: str
    kind: str
    size_bytes: int


def session_path(path: Any) -> str:
    """Check a path that the user names in a session, and return it without ``.`` and doubled slashes.

    Raises:
        FileRefused: It leaves the session's folders.
    """
    if not isinstance(path, str) or not path or "\0" in path or len(path) > _MAX_PATH_CHARS:
        raise FileRefused("a path in the session is a text without NUL, and not empty", path=f"{path!s:.500}")
    if path.startswith("/") and not path.startswith(_ALSO):
        raise FileRefused(
            "it leaves the session", path=path, help="use a path relative to its folder, or one that begins with /tmp/"
        )
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise FileRefused("it leaves the session: '..' is not allowed", path=path)
    return ("/" if path.startswith("/") else "") + "/".join(parts) or "."


def read_listing(path: str, answer: Any, max_entries: int) -> tuple[Entry, list[Entry]]:
    """Read what a session says is at a path: the thing itself, and what is below it, folders first.

    Raises:
        FileRefused: A name that is not safe to use here.
        MalformedReply: It is no listing, or contradicts itself.
    """
    try:
        root = Entry("", _kind(answer["kind"]), _size(answer["size"]))
        items = answer["entries"]
        if not isinstance(items, list) or len(items) > max_entries:
            raise ValueError("entries")
        entries = [Entry(_text(item[0]), _kind(item[1]), _size(item[2])) for item in items]
    except (KeyError, IndexError, TypeError, ValueError):
        raise MalformedReply(f"the session gave no listing of {path!a:.500}") from None
    folders = {""}
    for entry in entries:
        check_relative(entry.path)
        around, _, _ = entry.path.rpartition("/")
        if around not in folders or entry.path in folders or root.kind != "folder":
            raise MalformedReply(f"the session's listing of {path!a:.500} contradicts itself")
        if entry.kind == "folder":
            folders.add(entry.path)
    return root, entries


def read_parts(answer: Any, wanted: list[int]) -> list[tuple[bytes, bool]]:
    """Read parts of files, each with whether its file ends there.

    Args:
        answer: What the session gave, see ``broker/worker/files.py``.
        wanted: How many bytes of each were asked for.

    Raises:
        MalformedReply: It is none, or gives other sizes than asked for.
    """
    try:
        head, _, text = _text(answer).partition("\n")
        notes = [_PART.fullmatch(note) for note in head.split(" ")]
        sizes = [(int(note[1]), note[2] == "1") for note in notes if note is not None]
        data = base64.b64decode(text, validate=True)
        if len(sizes) != len(wanted) or len(notes) != len(wanted) or sum(size for size, _ in sizes) != len(data):
            raise ValueError("sizes")
        if any(size > most or (size < most and not end) for (size, end), most in zip(sizes, wanted, strict=True)):
            raise ValueError("size")
    except (TypeError, ValueError, binascii.Error):
        raise MalformedReply("the session gave other parts of files than it was asked for") from None
    view, at = memoryview(data), 0
    parts = []
    for size, end in sizes:
        parts.append((bytes(view[at : at + size]), end))
        at += size
    return parts


def check_relative(path: str) -> None:
    """Refuse a path from a session that is not safe to create below a folder of the host.

    Raises:
        FileRefused: It is.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise FileRefused("the session gave a name that leads elsewhere", path=path)
    if any(ord(character) < 32 or ord(character) == 127 for character in path) or "\\" in path:
        raise FileRefused("the session gave a name with characters that are not safe here", path=path)
    try:
        too_long = any(len(part.encode("utf-8", "surrogateescape")) > _MAX_NAME_BYTES for part in parts)
    except UnicodeEncodeError:
        raise FileRefused("the session gave a name that is no text", path=path) from None
    if too_long or len(path) > _MAX_PATH_CHARS:
        raise FileRefused("the session gave a name that is too long", path=path)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("text")
    return value


def _kind(value: Any) -> str:
    if value not in _KINDS:
        raise ValueError("kind")
    return str(value)


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("size")
    return value
