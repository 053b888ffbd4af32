"""Being told by the kernel that something has appeared in a directory (inotify), on either side of the wire."""

from __future__ import annotations

import contextlib
import ctypes
import os
from types import TracebackType

_IN_ATTRIB, _IN_MOVED_TO, _IN_CREATE = 0x4, 0x80, 0x100


class DirectoryWatch:
    """Becomes readable when something appears in a directory (inotify).

    Watch before starting what will appear, so that nothing is missed. ``fileno()`` is for ``select.poll``.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify is not available")
        if libc.inotify_add_watch(self._fd, os.fsencode(directory), _IN_CREATE | _IN_MOVED_TO | _IN_ATTRIB) < 0:
            code = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(code, f"cannot watch {directory}: {os.strerror(code)}")

    def fileno(self) -> int:
        """Return the file descriptor to poll."""
        return self._fd

    def drain(self) -> bool:
        """Forget the events so far; tell whether there were any."""
        found = False
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 4096):
                found = True
        return found

    def __enter__(self) -> DirectoryWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
