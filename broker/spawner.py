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


@dataclasses.dataclass(frozen=True, slots=True)
class Spawned:
    """A worker that was started: its pid, and our end of its channel."""

    pid: int
    channel: socket.socket


class WorkerSpawner(Protocol):
    """Starts and ends worker processes. Only ``spawn`` and ``adopt`` wait; the rest calls back from the event loop."""

    def spawn(self, slot: int, on_exit: Callable[[str], None]) -> Spawned:
        """Start the first worker of a slot.

        Args:
            slot: A free slot.
            on_exit: Called with the reason when the worker has ended.

        Raises:
            SessionStartFailed: It could not be started.
        """

    def adopt(self, slot: int, channel: socket.socket, on_exit: Callable[[str], None]) -> int:
        """Wait for the copy that a worker of the slot forks, and return its pid, of which the kernel is the witness.

        Args:
            slot: The worker's.
            channel: Our end of the copy's channel, with SO_PASSCRED; nothing is read from it.
            on_exit: As for ``spawn``.

        Raises:
            ForkFailed: None came.
        """

    def interrupt(self, slot: int, pid: int, done: Callable[[], None]) -> None:
        """Send SIGINT to a worker; ``done`` is called once it was sent."""

    def end(self, slot: int, pid: int, done: Callable[[], None]) -> None:
        """Kill one worker of several in a slot, with its process group; ``done`` is called once it is gone."""

    def sweep(self, slot: int, done: Callable[[bool], None]) -> None:
        """Kill every process of the slot and remove its files; ``done`` is told whether nothing is left."""

    def memory_bytes(self, pid: int) -> int | None:
        """Return the memory that a worker holds besides files, or None where that cannot be told."""

    def slot_of(self, peer: Peer) -> int | None:
        """Return the slot that a process on the guest's socket belongs to."""
