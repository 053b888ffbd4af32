"""The memory files that one session's calls and stored replies hold: so many descriptors, and no more."""

from __future__ import annotations

from broker.protocol import limits
from broker.protocol.blob_file import BlobFile, Blobs


class HeldFiles:
    """Keeps what is stored, in files while there are few of them, else the oldest as bytes.

    Args:
        most: Descriptors held at once.
    """

    def __init__(self, most: int = limits.MAX_SESSION_FILES) -> None:
        self._most = most
        # By identity, oldest first.
        self._files: dict[int, BlobFile] = {}

    def __len__(self) -> int:
        return len(self._files)

    def keep(self, file: BlobFile) -> BlobFile:
        """Take a file over from the frame that brought it."""
        kept = file.moved()
        self._files[id(kept)] = kept
        while len(self._files) > self._most:
            self._files.pop(next(iter(self._files))).settle()
        return kept

    def let_go(self, blobs: Blobs) -> None:
        """Close what is not needed any more; nothing happens to what is no file."""
        if isinstance(blobs, BlobFile):
            self._files.pop(id(blobs), None)
            blobs.close()

    def close(self) -> None:
        """Close all of them."""
        for file in self._files.values():
            file.close()
        self._files.clear()
