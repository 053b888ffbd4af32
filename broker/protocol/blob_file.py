"""Blobs in a memory file that is handed over as a descriptor instead of travelling as bytes.

For large values: nothing is copied on the way, and the process in between holds nothing but a number. The file is
sealed before it leaves, so that neither side can change or shorten it under the other.

Generated code makes such files too, so nothing is believed that the kernel does not vouch for; see ``check``.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import final

from broker.protocol.frames import Blob, FrameError

#: Linux' memory files; elsewhere blobs travel as bytes.
AVAILABLE = hasattr(os, "memfd_create")
#: From here on a file is cheaper than the bytes.
WORTH_BYTES = 128 << 10

# fcntl's names for these came with Python 3.9's, but not on every platform.
_ADD_SEALS, _GET_SEALS = 1033, 1034
_SEALED = 0x1 | 0x2 | 0x4 | 0x8  # no more seals, no shrinking, no growing, no writing
_CHUNK_CHARS = 4 << 20
_FD_BYTES = array.array("i").itemsize
_DISK_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own is

#: Descriptors taken with one read; a frame has one. The kernel closes what does not fit.
MOST_FDS = 4
#: Room for those in ``recvmsg``. CMSG_SPACE would have room for one more.
ANCILLARY_BYTES = socket.CMSG_LEN(MOST_FDS * _FD_BYTES)

#: What ``recvmsg`` gives beside the bytes.
Ancillary = Iterable[tuple[int, int, bytes]]


@final
class BlobFile:
    """The blobs of one frame, one after the other in a file.

    Args:
        fd: Its descriptor, owned by this object.
        lengths: Of the blobs, in bytes.

    Attributes:
        fd: The descriptor, or -1 after ``close``, ``moved`` and ``settle``.
    """

    __slots__ = ("_data", "fd", "lengths")

    def __init__(self, fd: int, lengths: Sequence[int]) -> None:
        self.fd, self.lengths = fd, list(lengths)
        self._data: bytes | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def size(self) -> int:
        """Bytes of all blobs."""
        return sum(self.lengths)

    @classmethod
    def of(cls, blobs: Sequence[Blob | str]) -> BlobFile:
        """Write blobs (also ASCII texts) into a new file, piece by piece, and seal it.

        Raises:
            OSError: There is no memory left for it.
        """
        fd = os.memfd_create("rlm-sandbox-blobs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            for blob in blobs:
                for piece in _pieces(blob):
                    _write(fd, piece)
            fcntl.fcntl(fd, _ADD_SEALS, _SEALED)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, [len(blob) for blob in blobs])

    @classmethod
    def received(cls, fds: Sequence[int], lengths: Sequence[int]) -> BlobFile:
        """Take over the descriptor that came with a frame; all of them are closed where this fails.

        Raises:
            FrameError: It is not one sealed file that holds these lengths, and nothing else.
        """
        try:
            if len(fds) != 1:
                raise FrameError(f"{len(fds)} descriptors came with a frame that has one")
            check(fds[0], sum(lengths))
        except BaseException:
            close_all(fds)
            raise
        return cls(fds[0], lengths)

    @classmethod
    def worth(cls, blobs: Sequence[Blob | str]) -> BlobFile | None:
        """Return large blobs in a file; None for small ones, and where no file can be had."""
        if not AVAILABLE or sum(map(len, blobs)) < WORTH_BYTES:
            return None
        try:
            return cls.of(blobs)
        except OSError:  # out of descriptors, or a limit for files: the bytes themselves get through all the same
            return None

    def views(self) -> list[memoryview]:
        """Return the blobs, as views into the file; it stays mapped as long as one of them lives."""
        if not self.size:
            return [memoryview(b"") for _ in self.lengths]
        if self._data is None and self.fd < 0:
            raise ValueError("this file was closed")  # mmap would take -1 for memory full of zeros
        if self._data is None:
            mapped = memoryview(mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ))
        else:
            mapped = memoryview(self._data)
        views, start = [], 0
        for length in self.lengths:
            views.append(mapped[start : start + length])
            start += length
        return views

    def moved(self) -> BlobFile:
        """Return the same file for somebody who keeps it: closing this object leaves that one alone."""
        other = BlobFile(self.fd, self.lengths)
        other._data, self.fd = self._data, -1
        return other

    def settle(self) -> None:
        """Hold the bytes instead of the descriptor, where descriptors are scarcer than memory."""
        if self.fd >= 0:
            self._data = b"".join(self.views())
            self.close()

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


#: The blobs of a frame, whichever way they come.
Blobs = Sequence[Blob] | BlobFile


def check(fd: int, size: int) -> None:
    """Make sure that a descriptor is a memory file which can be mapped and read without any surprise.

    Never reads, so nothing can keep us waiting.

    Raises:
        FrameError: Something of that does not hold.
    """
    try:
        found, readable = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
        # Of huge pages none may be left when it is read, which ends the reader (SIGBUS); nobody is charged for them.
        ordinary = stat.S_ISREG(found.st_mode) and os.fstatvfs(fd).f_bsize == mmap.PAGESIZE
    except OSError as error:
        raise FrameError(f"the descriptor is no file: {error.strerror}") from None
    # The order counts: what is sealed has the size and the pages that it will have for ever.
    if not (readable and ordinary and is_sealed(fd)):
        raise FrameError("the descriptor is not a sealed memory file")
    found = os.fstat(fd)
    if not 0 < size == found.st_size:
        raise FrameError(f"a file of {found.st_size} bytes where {size} were announced")
    # A hole gets its pages when it is read, and the reader is charged for them, not the sandbox that made the file.
    if found.st_blocks * _DISK_BLOCK_BYTES < size:
        raise FrameError("a file with holes")


def descriptors(ancillary: Ancillary) -> list[int]:
    """Return the descriptors that came with some bytes; the caller owns them."""
    found: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.extend(array.array("i", payload[: len(payload) // _FD_BYTES * _FD_BYTES]))
    return found


def rights(fds: Sequence[int]) -> Sequence[tuple[int, int, bytes]]:
    """Return what ``sendmsg`` needs to send descriptors."""
    return ((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes()),)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that somebody else has sent."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def is_sealed(fd: int) -> bool:
    """Tell whether nobody can change a file any more; only memory files can be sealed."""
    try:
        return fcntl.fcntl(fd, _GET_SEALS) & _SEALED == _SEALED
    except OSError:
        return False


def as_views(blobs: Blobs) -> Sequence[Blob]:
    """Return the blobs for the way through a stream, whichever way they came."""
    return blobs.views() if isinstance(blobs, BlobFile) else blobs


def as_bytes(blobs: Sequence[Blob | str]) -> list[Blob]:
    """Return the blobs for the way through a stream."""
    return [blob.encode("ascii") if isinstance(blob, str) else blob for blob in blobs]


def _pieces(blob: Blob | str) -> Iterator[Blob]:
    if not isinstance(blob, str):
        yield blob
        return
    for start in range(0, len(blob), _CHUNK_CHARS):
        yield blob[start : start + _CHUNK_CHARS].encode("ascii")


def _write(fd: int, piece: Blob) -> None:
    view = memoryview(piece).cast("B")
    while view:
        view = view[os.write(fd, view) :]
