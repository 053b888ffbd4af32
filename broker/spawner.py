"""The seam between the broker and whatever starts, signals and kills workers."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a Unix socket, as the kernel saw it when it connected."""

    pid: int
    uid: int


class WorkerSpawner(Protocol):
    """Starts and ends worker processes. Only ``spawn`` waits; the rest calls back from the event loop."""

    def spawn(self, slot: int, on_exit: Callable[[str], None]) -> socket.socket:
        """Start the worker of a slot and return our end of its channel.

        Args:
            slot: A free slot.
            on_exit: Called with the reason when the worker has ended.

        Raises:
            SessionStartFailed: It could not be started.
        """

    def interrupt(self, slot: int, done: Callable[[], None]) -> None:
        """Send SIGINT to the worker; ``done`` is called once it was sent."""

    def sweep(self, slot: int, done: Callable[[bool], None]) -> None:
        """Kill every process of the slot and remove its files; ``done`` is told whether nothing is left."""

    def memory_bytes(self, slot: int) -> int | None:
        """Return the memory that the worker of a slot holds besides files, or None where that cannot be told."""

    def slot_of(self, peer: Peer) -> int | None:
        """Return the slot that a process on the guest's socket belongs to."""
