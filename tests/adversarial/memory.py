"""How much memory this process takes, at its peak since it was last asked."""

from __future__ import annotations

from pathlib import Path

_KIB = 1024


class MemoryPeak:
    """The peak of resident memory from its making on; what was used before does not count."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is used now
        self._before = _status_bytes("VmRSS")

    def growth_bytes(self) -> int:
        """Return how far the peak lies above the start."""
        return max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * _KIB
    raise LookupError(name)
