"""The sandboxes that a provider owns, and their end with the process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from host_client.at_exit import at_exit
from host_client.providers.base import SandboxHandle


class Owned:
    """The sandboxes that one provider owns in one process: as long as there are any, its exit stops them.

    Without any, nothing refers to the provider for the exit's sake: a program may make one for each sandbox.
    """

    def __init__(self) -> None:
        # Guards both: there is something to cancel exactly while there are handles.
        self._lock = threading.Lock()
        self._handles: dict[str, SandboxHandle] = {}
        self._cancel: Callable[[], None] | None = None

    def __contains__(self, sandbox_id: str) -> bool:
        return sandbox_id in self._handles

    def add(self, handle: SandboxHandle, stop_all: Callable[[], None]) -> None:
        """Own one more.

        Args:
            handle: The sandbox.
            stop_all: Called when the process exits.
        """
        with self._lock:
            self._handles[handle.sandbox_id] = handle
            if self._cancel is None:
                self._cancel = at_exit(stop_all)

    def drop(self, sandbox_id: str) -> None:
        """Own it no longer. Idempotent."""
        with self._lock:
            self._handles.pop(sandbox_id, None)
            if not self._handles and self._cancel is not None:
                self._cancel()
                self._cancel = None

    def handles(self) -> list[SandboxHandle]:
        """Return what is owned now."""
        return list(self._handles.values())
