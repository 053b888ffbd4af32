"""Writes a namespace, variable by variable; what cannot be written is taken back and named."""

from __future__ import annotations

import errno
import os
import platform
import re
from collections.abc import Callable, Mapping
from typing import Any

from broker.worker.display import type_name
from broker.worker.durable.obstacles import Obstacle, reason_of
from broker.worker.durable.packages import needed_by
from broker.worker.durable.pickling import is_tool, pickler_class

#: Of the module and of the REPL, not of the session's code.
_OWN_NAMES = frozenset({"__builtins__", "__name__", "__doc__", "__package__", "__loader__", "__spec__"})
#: A longer one is not what a program would call something.
MAX_NAME_CHARS = 500
_MAX_TYPE_CHARS = 100
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)


def belongs_to_session(name: Any, value: Any) -> bool:
    """Tell whether a variable is the session's, and not one that every session has, such as its tools."""
    return not (name in _OWN_NAMES or (is_tool(value) and value.__name__ == name))


class Sink:
    """The file that is written to, as the pickler sees it.

    Args:
        fd: A file that can be sought in.
        secrets: Values by name that must not get into it.
    """

    def __init__(self, fd: int, secrets: Mapping[str, str]) -> None:
        self._fd = fd
        forms = {name: value.encode("utf-8", "surrogateescape") for name, value in secrets.items() if value}
        self._names = list(forms)
        self._pattern = re.compile(b"|".join(b"(%s)" % re.escape(form) for form in forms.values())) if forms else None
        self._overlap = max(map(len, forms.values()), default=1) - 1
        self._tail = b""
        self.size = 0

    def write(self, data: Any) -> int:
        """Append all of it.

        Raises:
            Obstacle: It holds a secret.
            OSError: There is no room.
        """
        view = memoryview(data).cast("B")
        if self._pattern is not None:
            self._refuse_secrets(view)
        left = view
        while left:
            left = left[os.write(self._fd, left) :]
        self.size += len(view)
        return len(view)

    def cut(self, size: int) -> None:
        """Take back everything behind ``size`` bytes."""
        os.ftruncate(self._fd, size)
        os.lseek(self._fd, size, os.SEEK_SET)
        self.size, self._tail = size, b""

    def secret_in(self, data: Any) -> str | None:
        """Return the name of a secret that these bytes hold."""
        found = None if self._pattern is None else self._pattern.search(data)
        return None if found is None else self._names[(found.lastindex or 1) - 1]

    def _refuse_secrets(self, view: memoryview) -> None:
        name = self.secret_in(view) or self.secret_in(self._tail + bytes(view[: self._overlap]))
        if name is not None:
            raise Obstacle(f"holds the secret {name}")
        self._tail = (self._tail + bytes(view[-self._overlap :]))[-self._overlap :]


def write(
    namespace: dict[str, Any], fd: int, secrets: Mapping[str, str], announce: Callable[[str], None]
) -> dict[str, Any]:
    """Write what can be written of a namespace.

    Args:
        namespace: The session's.
        fd: An empty file.
        secrets: Values by name; a variable that holds one is not written.
        announce: Told of each variable before it is written.

    Returns:
        ``{"saved": [[name, type, bytes], ...], "not_saved": {name: reason}, "packages": {name: version}, "python",
        "size"}``.

    Raises:
        OSError: There is no room for it.
    """
    sink = Sink(fd, secrets)
    pickler = pickler_class()(sink, namespace)
    pickler.anchor()
    saved: list[list[Any]] = []
    not_saved: dict[str, str] = {}
    for name, value in list(namespace.items()):
        if not belongs_to_session(name, value):
            continue
        if type(name) is not str or not name.isprintable() or not 0 < len(name) <= MAX_NAME_CHARS:
            not_saved[ascii(name)[:MAX_NAME_CHARS]] = "a name that is no ordinary text"
            continue
        announce(name)
        before = sink.size
        reason = _write_one(pickler, sink, name, value)
        if reason is None:
            saved.append([name, type_name(type(value))[:_MAX_TYPE_CHARS], sink.size - before])
        else:
            not_saved[name] = reason
    announce("")
    _write_end(pickler, sink)
    return {
        "saved": saved,
        "not_saved": not_saved,
        "packages": needed_by(pickler.modules),
        "python": platform.python_version(),
        "size": sink.size,
    }


def _write_one(pickler: Any, sink: Sink, name: str, value: Any) -> str | None:
    """Write one variable, or nothing; return why it was not, if so."""
    marker = [name]
    before, modules = sink.size, set(pickler.modules)
    pickler.last = None
    try:
        pickler.dump(marker)
        pickler.dump(value)
    except OSError as error:
        if error.filename is None and error.errno in _NO_ROOM:
            raise
        failure: BaseException = error
    except BaseException as error:  # generated code's own, such as SystemExit
        failure = error
    else:
        return None
    culprit = pickler.last
    _take_back(pickler, sink, marker, before)
    pickler.modules = modules
    return reason_of(name, value, culprit, failure)


def _take_back(pickler: Any, sink: Sink, marker: Any, size: int) -> None:
    sink.cut(size)
    pickler.forget_from(marker)


def _write_end(pickler: Any, sink: Sink) -> None:
    """Write that there is no further variable, and the source text of functions, for tracebacks."""
    sources = {}
    for name, source in pickler.sources.items():
        if sink.secret_in(source.encode("utf-8", "surrogatepass")) is None:
            sources[name] = source
    pickler.dump([None, sources])
