"""The broker's side of the supervisor: starts, interrupts and sweeps workers in the container."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import socket
from collections.abc import Callable
from typing import Any

import gevent
from gevent.event import AsyncResult

from broker.errors import ForkFailed, SessionStartFailed
from broker.protocol.self_test import SelfTest
from broker.spawner import Peer, Spawned
from broker.supervisor import link
from broker.supervisor.proc_status import read_status

#: A fork takes milliseconds; a supervisor that does not answer for so long is stuck.
SPAWN_LIMIT_S = 10.0
#: A worker forks in milliseconds; one of many gigabytes, on a busy machine, in seconds.
FORK_LIMIT_S = 10.0

Reply = dict[str, Any]


@dataclasses.dataclass(slots=True)
class _Running:
    slot: int
    on_exit: Callable[[str], None]


class SupervisorClient:
    """Speaks to the supervisor over its socket.

    Args:
        sock: Our end of the socket pair; it is closed by ``close``.
        guest_uid_base: Uid of slot 0, or None where every process has the same uid (tests).
        max_slots: Number of slots.
        on_gone: Called once when the supervisor is gone.
        one_user: Whether there is one slot, whose processes are alone with this broker's ``guest.sock``.

    Attributes:
        self_test: Set to what the supervisor found out at its start.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        guest_uid_base: int | None,
        max_slots: int,
        on_gone: Callable[[], None],
        one_user: bool = False,
    ) -> None:
        sock.setblocking(False)
        self._sock, self._base, self._max_slots, self._on_gone = sock, guest_uid_base, max_slots, on_gone
        self._one_user = one_user
        self.self_test: AsyncResult = AsyncResult()
        self._ids = itertools.count(1)
        self._waiting: dict[int, Callable[[Reply, list[int]], None]] = {}
        self._running: dict[int, _Running] = {}  # by pid
        self._watcher = gevent.get_hub().loop.io(sock.fileno(), 1)
        self._watcher.start(self._readable)

    def spawn(self, slot: int, on_exit: Callable[[str], None]) -> Spawned:
        """Start the first worker of a slot.

        Raises:
            SessionStartFailed: The supervisor could not fork, or does not answer.
        """
        answer = self._wait_for_pid("spawn", slot, on_exit)
        try:
            reply, fds = answer.get(timeout=SPAWN_LIMIT_S)
        except gevent.Timeout:
            raise SessionStartFailed("the supervisor does not answer") from None
        if not fds:
            raise SessionStartFailed(f"the worker could not be started: {reply.get('error', 'no reason given')}")
        return Spawned(reply["pid"], socket.socket(fileno=fds[0]))

    def adopt(self, slot: int, channel: socket.socket, on_exit: Callable[[str], None]) -> int:
        """Wait for the copy that a worker of the slot forks, and return its pid.

        Raises:
            ForkFailed: None came.
        """
        answer = self._wait_for_pid("adopt", slot, on_exit, channel.fileno())
        try:
            reply, _ = answer.get(timeout=FORK_LIMIT_S)
        except gevent.Timeout:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)  # the supervisor waits no longer either
            raise ForkFailed(f"the session did not fork within {FORK_LIMIT_S:g} s") from None
        if "pid" not in reply:
            raise ForkFailed(f"the session could not be forked: {reply.get('error', 'no reason given')}")
        return int(reply["pid"])

    def interrupt(self, slot: int, pid: int, done: Callable[[], None]) -> None:
        """Send SIGINT to a worker; ``done`` is called once it was sent."""
        self._ask({"op": "signal", "slot": slot, "pid": pid}, lambda reply, fds: done())

    def end(self, slot: int, pid: int, done: Callable[[], None]) -> None:
        """Kill one worker of several in a slot; ``done`` is called once it is gone."""
        self._running.pop(pid, None)
        self._ask({"op": "end", "slot": slot, "pid": pid}, lambda reply, fds: done())

    def sweep(self, slot: int, done: Callable[[bool], None]) -> None:
        """Kill every process of the slot and remove its files; ``done`` is told whether nothing is left."""
        self._running = {pid: worker for pid, worker in self._running.items() if worker.slot != slot}
        self._ask({"op": "sweep", "slot": slot}, lambda reply, fds: done(bool(reply.get("clean"))))

    def memory_bytes(self, pid: int) -> int | None:
        """Return the memory that a worker holds besides files; what it shares with others counts too."""
        try:
            status = read_status(pid) if pid in self._running else {}
            kib = [int(status[field].split()[0]) for field in ("RssAnon", "RssShmem")]
        except (OSError, KeyError, ValueError, IndexError):
            return None
        return sum(kib) << 10

    def slot_of(self, peer: Peer) -> int | None:
        """Return the slot of a process on the guest's socket: by uid, or in tests by its worker's process session."""
        if self._one_user:
            return 0
        if self._base is not None:
            slot = peer.uid - self._base
            return slot if 0 <= slot < self._max_slots else None
        try:
            leader = os.getsid(peer.pid)
        except ProcessLookupError:
            return None
        worker = self._running.get(leader)
        return None if worker is None else worker.slot

    def close(self) -> None:
        """Close the connection; a supervisor ends everything then."""
        if self._sock.fileno() >= 0:
            self._watcher.stop()
            self._watcher.close()
            self._sock.close()

    def _wait_for_pid(
        self, operation: str, slot: int, on_exit: Callable[[str], None], fd: int | None = None
    ) -> AsyncResult:
        answer: AsyncResult = AsyncResult()

        def started(reply: Reply, fds: list[int]) -> None:
            # Noted at once: the worker's end may be told in the very next message.
            if "pid" in reply:
                self._running[reply["pid"]] = _Running(slot, on_exit)
            answer.set((reply, fds))

        self._ask({"op": operation, "slot": slot}, started, fd)
        return answer

    def _ask(
        self, message: dict[str, Any], answered: Callable[[Reply, list[int]], None], fd: int | None = None
    ) -> None:
        message_id = next(self._ids)
        self._waiting[message_id] = answered
        try:
            link.send(self._sock, {"id": message_id, **message}, fd)
        except OSError:
            self._on_gone()

    def _readable(self) -> None:
        try:
            received = link.receive(self._sock)
        except BlockingIOError:
            return
        if received is None:
            self._watcher.stop()
            self._on_gone()
            return
        message, fds = received
        if "self_test" in message:
            self.self_test.set(SelfTest.from_json(message["self_test"]))
            return
        if "exited" in message:
            worker = self._running.get(message["pid"])
            if worker is not None and worker.slot == message["exited"]:
                worker.on_exit(message["reason"])
            return
        answered = self._waiting.pop(message["re"], None)
        if answered is not None:
            answered(message, fds)
