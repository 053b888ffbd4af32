"""What a provider does when its process exits."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable


def at_exit(holder: type, stop: Callable[[], None]) -> None:
    """Run ``stop`` when this process exits; children of ``multiprocessing`` skip ``atexit``.

    Args:
        holder: A class of the caller's module, which lives as long as the process.
        stop: Stops what is left.
    """
    util = sys.modules.get("multiprocessing.util")
    process = sys.modules.get("multiprocessing.process")
    if util is not None and process is not None and process.parent_process() is not None:
        util.Finalize(None, stop, exitpriority=0)
    else:
        # Not atexit: finalizers run newest first, so sessions end before this, and those that were fenced say so.
        weakref.finalize(holder, stop)
