"""What happens at the end of this process, in whichever way it ends that lets it do anything."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable


class _Anchor:
    """Something to tie a finalizer to that lives as long as the process."""


def at_exit(run: Callable[[], None]) -> Callable[[], None]:
    """Run something when this process exits; children of ``multiprocessing`` skip ``atexit``.

    A forked child takes the hooks of its parent along, but what is to be ended is the parent's, and the locks around it
    may have been held by threads that the child does not have: nothing is run there.

    Returns:
        What takes that back, so that nothing is held for it any more. Idempotent.
    """
    util = sys.modules.get("multiprocessing.util")
    process = sys.modules.get("multiprocessing.process")
    if util is not None and process is not None and process.parent_process() is not None:
        cancel: Callable[[], None] = util.Finalize(None, run, exitpriority=0).cancel
        return cancel
    # Not atexit: finalizers run newest first, so sessions end before this, and those that were fenced say so.
    registered_by = os.getpid()
    finalizer = weakref.finalize(_Anchor, lambda: run() if os.getpid() == registered_by else None)
    return lambda: finalizer.detach() and None
