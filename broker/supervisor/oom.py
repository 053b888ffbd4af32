"""How often the kernel killed for lack of memory in our control group, so that a SIGKILL can be given its name."""

from __future__ import annotations

import re
from pathlib import Path

#: Version 2, then version 1, as mounted inside a container.
_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))


class OomCounter:
    """Tells whether an out-of-memory kill happened since it was asked last. Best effort: no counter, no kill."""

    def __init__(self) -> None:
        self._file = next((path for path in _COUNTERS if path.is_file()), None)
        self._seen = self._read()

    def rose(self) -> bool:
        """Return whether the count rose since the last call (or the start)."""
        before, self._seen = self._seen, self._read()
        return self._seen > before

    def _read(self) -> int:
        if self._file is None:
            return 0
        try:
            found = re.search(r"^oom_kill (\d+)$", self._file.read_text(), re.MULTILINE)
        except OSError:
            return 0
        return 0 if found is None else int(found[1])
