"""Puts a saved namespace in the place of the session's. If that fails, the session has the old one still."""

from __future__ import annotations

import collections
import contextlib
import gc
import linecache
import pickle
from collections.abc import Iterator
from typing import Any

from broker.worker.display import safe_str, type_name
from broker.worker.durable import rebuild
from broker.worker.durable.tolerant import TolerantUnpickler
from broker.worker.durable.writing import belongs_to_session

_MAX_REASON_CHARS = 300


class _Chunks:
    """A file that forgets what was read: the bytes and what is made of them are not all there at once."""

    def __init__(self, chunks: collections.deque[bytes]) -> None:
        self._chunks, self._at = chunks, 0

    def readinto(self, target: Any) -> int:
        """Fill a buffer, as far as there is something."""
        view, filled = memoryview(target).cast("B"), 0
        while filled < len(view) and self._chunks:
            piece = memoryview(self._chunks[0])[self._at : self._at + len(view) - filled]
            view[filled : filled + len(piece)] = piece
            filled, self._at = filled + len(piece), self._at + len(piece)
            if self._at == len(self._chunks[0]):
                piece.release()
                self._chunks.popleft()
                self._at = 0
        return filled

    def read(self, size: int) -> bytes:
        """Return so many bytes, or what is left."""
        if self._chunks and self._at + size < len(self._chunks[0]):
            self._at += size
            return self._chunks[0][self._at - size : self._at]
        data = bytearray(size)
        return bytes(data[: self.readinto(data)])

    def readline(self) -> bytes:
        """Return a line; the format has some where numbers are written as text."""
        line = b""
        while not line.endswith(b"\n") and (byte := self.read(1)):
            line += byte
        return line


#: State of the process, which is one session's: what has arrived so far.
_arrived: collections.deque[bytes] = collections.deque()


def start() -> None:
    """Begin anew; also the end of it all."""
    _arrived.clear()


def part(data: bytes) -> None:
    """Take the next part of what was saved."""
    if data:
        _arrived.append(data)


def load(namespace: dict[str, Any], tolerant: bool) -> dict[str, Any]:
    """Replace the namespace by what has arrived.

    Args:
        namespace: The session's; as it was, if this fails.
        tolerant: Leave out what fails, which takes longer.

    Returns:
        ``{"restored": [name, ...], "failed": {name: reason}}``, or ``{"problem": text}`` and nothing has changed.
    """
    before = dict(namespace)
    try:
        with _new_classes(), _without_collections(), rebuild.into(namespace):
            return _load(namespace, tolerant)
    except BaseException as error:
        namespace.clear()
        namespace.update(before)
        if not isinstance(error, Exception):
            raise
        return {"problem": f"{type_name(type(error))}: {safe_str(error)}"[:_MAX_REASON_CHARS]}
    finally:
        _arrived.clear()


def _load(namespace: dict[str, Any], tolerant: bool) -> dict[str, Any]:
    stays = {name: value for name, value in namespace.items() if not belongs_to_session(name, value)}
    namespace.clear()
    namespace.update(stays)
    reader: Any = (TolerantUnpickler if tolerant else pickle.Unpickler)(_Chunks(_arrived))
    reader.load()  # the namespace itself
    restored: list[str] = []
    failed: dict[str, str] = {}
    while (marker := reader.load())[0] is not None:
        [name] = marker
        value, reason = reader.load_named(name) if tolerant else (reader.load(), None)
        if reason is None:
            namespace[name] = value
            restored.append(name)
        else:
            failed[name] = reason
    for name, text in marker[1].items():
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    return {"restored": restored, "failed": failed}


@contextlib.contextmanager
def _new_classes() -> Iterator[None]:
    """Make classes anew that this process has from the same session: what is restored does not change the old ones."""
    import weakref

    import cloudpickle.cloudpickle as tracker

    name = "_DYNAMIC_CLASS_TRACKER_BY_ID"
    known = getattr(tracker, name, None)
    if known is not None:
        setattr(tracker, name, weakref.WeakValueDictionary())
    try:
        yield
    except BaseException:
        if known is not None:
            setattr(tracker, name, known)
        raise


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Keep the garbage collector from looking at a million new objects again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
