"""What a broker in this process holds on to: descriptors and memory."""

from __future__ import annotations

import gc
import os
from pathlib import Path

#: Caches and pools fill up once.
_MEMORY_SLACK_BYTES = 48 << 20
_DESCRIPTOR_SLACK = 8


class Growth:
    """Compares now with the time when it was made."""

    def __init__(self) -> None:
        self._descriptors, self._memory = _descriptors(), _memory_bytes()

    def bounded(self) -> bool:
        """Tell whether little was held on to; raises with the figures where it was more."""
        gc.collect()
        descriptors, memory = _descriptors() - self._descriptors, _memory_bytes() - self._memory
        assert descriptors <= _DESCRIPTOR_SLACK, f"{descriptors} descriptors more"
        assert memory <= _MEMORY_SLACK_BYTES, f"{memory / 2**20:.0f} MiB more"
        return True


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
