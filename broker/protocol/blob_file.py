"""Blobs in a memory file that is handed over as a descriptor instead of travelling as bytes.

For large values: nothing is copied on the way, and the process in between holds nothing but a number. The file is
sealed before it leaves, so that neither side can change or shorten it under the other.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from collections.abc import Iterator, Sequence

from broker.protocol.frames import Blob, FrameError

#: Linux' memory files; elsewhere blobs travel as bytes.
AVAILABLE = hasattr(os, "memfd_create")
#: From here on a file is cheaper than the bytes.
WORTH_BYTES = 128 << 10

# fcntl's names for these came with Python 3.9's, but not on every platform.
_ADD_SEALS, _GET_SEALS = 1033, 1034
_SEALED = 0x1 | 0x2 | 0x4 | 0x8  # no more seals, no shrinking, no growing, no writing
_CHUNK_CHARS = 4 << 20


class BlobFile:
    """The blobs of one frame, one after the other in a file.

    Args:
        fd: Its descriptor, owned by this object.
        lengths: Of the blobs, in bytes.
    """

    def __init__(self, fd: int, lengths: Sequence[int]) -> None:
        self.fd, self.lengths = fd, list(lengths)

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
        fd = os.memfd_create("rlm-sandbox-variables", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
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
            FrameError: It is not one sealed file that holds these lengths.
        """
        try:
            if len(fds) != 1:
                raise FrameError(f"{len(fds)} descriptors came with a frame that has one")
            found = os.fstat(fds[0])
            if not stat.S_ISREG(found.st_mode) or found.st_size < sum(lengths) or not is_sealed(fds[0]):
                raise FrameError("the descriptor is not a sealed file of the announced size")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return cls(fds[0], lengths)

    def views(self) -> list[memoryview]:
        """Return the blobs, as views into the file; it stays mapped as long as one of them lives."""
        if not self.size:
            return [memoryview(b"") for _ in self.lengths]
        mapped = memoryview(mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ))
        views, start = [], 0
        for length in self.lengths:
            views.append(mapped[start : start + length])
            start += length
        return views

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


#: The blobs of a frame, whichever way they come.
Blobs = Sequence[Blob] | BlobFile


def is_sealed(fd: int) -> bool:
    """Tell whether nobody can change a file any more; only memory files can be sealed."""
    try:
        return fcntl.fcntl(fd, _GET_SEALS) & _SEALED == _SEALED
    except OSError:
        return False


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
