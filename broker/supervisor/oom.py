"""How often the kernel killed for lack of memory in our control group, so that a SIGKILL can be given its name."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

#: Version 2, then version 1, as mounted inside a container.
_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
#: One shortage may kill several processes, whose ends are seen one after the other.
_ONE_SHORTAGE_S = 1.0


class OomCounter:
    """Tells whether an out-of-memory kill happened since it was asked last, or just before. Best effort.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = next((path for path in _COUNTERS if path.is_file()), None)
        self._clock = clock
        self._seen = self._read()
        self._lasts_until = clock()

    def rose(self) -> bool:
        """Return whether the count rose since the last call (or the start), or had risen a moment ago."""
        before, self._seen = self._seen, self._read()
        if self._seen > before:
            self._lasts_until = self._clock() + _ONE_SHORTAGE_S
        return self._clock() < self._lasts_until

    def _read(self) -> int:
        if self._file is None:
            return 0
        try:
            found = re.search(r"^oom_kill (\d+)$", self._file.read_text(), re.MULTILINE)
        except OSError:
            return 0
        return 0 if found is None else int(found[1])
