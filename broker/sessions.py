"""All sessions of the sandbox, and the slots that they take."""

from __future__ import annotations

import heapq
import secrets
import time
from collections.abc import Iterator

from broker.errors import NameTaken, TooManySessions, UnknownCall, UnknownExecution, UnknownSession
from broker.executions import Execution
from broker.live_session import LiveSession
from broker.logs import Log
from broker.protocol.messages import OpenRequest
from broker.spawner import Peer, WorkerSpawner
from broker.tool_calls import Clock, ToolCall
from broker.waiting import Bell
from broker.worker_link import WorkerLink

#: Lost sessions that are remembered until somebody closes them, so that their reason can be told.
REMEMBERED_LOST_SESSIONS = 64

#: How long to wait for a slot that is being swept; processes that are stuck in the kernel take longer.
SWEEP_WAIT_S = 12.0


class Slots:
    """Numbers of places for sessions; the lowest free one is taken first.

    Args:
        count: How many there are.
    """

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._being_swept: set[int] = set()
        self._changed = Bell()

    def take(self) -> int:
        """Take a slot; wait only where one is just being swept.

        Raises:
            TooManySessions: All are in use.
        """
        if not self._free and self._being_swept:
            self._changed.wait_until(lambda: bool(self._free) or not self._being_swept, SWEEP_WAIT_S)
        if not self._free:
            raise TooManySessions(
                "every slot of this sandbox is taken (setting max_sessions); close a session, or start another sandbox"
            )
        return heapq.heappop(self._free)

    def sweeping(self, slot: int) -> None:
        """Note that a slot is being swept."""
        self._being_swept.add(slot)

    def swept(self, slot: int, clean: bool) -> None:
        """Give a slot back; one that could not be swept is never used again."""
        self._being_swept.discard(slot)
        if clean:
            heapq.heappush(self._free, slot)
        self._changed.ring()

    def wait_until_swept(self, slot: int) -> None:
        """Wait for the end of a sweep."""
        self._changed.wait_until(lambda: slot not in self._being_swept, SWEEP_WAIT_S)


class Sessions:
    """Opens, finds and closes sessions.

    Args:
        spawner: Where workers come from.
        max_sessions: Number of slots.
        log: For events.
        clock: Monotonic seconds.
    """

    def __init__(self, spawner: WorkerSpawner, *, max_sessions: int, log: Log, clock: Clock = time.monotonic) -> None:
        self._spawner, self._log, self._clock = spawner, log, clock
        self._slots = Slots(max_sessions)
        self._by_id: dict[str, LiveSession] = {}
        # The session whose processes run in a slot; kept apart from lost ones, whose slot may be another's by now.
        self._by_slot: dict[int, LiveSession] = {}

    def __len__(self) -> int:
        return len(self._by_slot)

    def __iter__(self) -> Iterator[LiveSession]:
        return iter(list(self._by_id.values()))

    def __getitem__(self, session_id: str) -> LiveSession:
        session = self._by_id.get(session_id)
        if session is None:
            raise UnknownSession(f"no session {session_id[:64]!r}")
        return session

    def open(self, wanted: OpenRequest) -> LiveSession:
        """Start a worker and open a session on it. Waits until the worker is ready.

        Args:
            wanted: What it begins with; its secrets are handed to the worker, and kept nowhere else.

        Raises:
            NameTaken: A living session has that name.
            TooManySessions: Every slot is taken.
            SessionStartFailed: The worker did not start.
        """
        name = wanted.name
        self._check_name(name)
        slot = self._slots.take()
        worker = WorkerLink(slot, self._spawner, lambda: self._sweeping(slot), lambda clean: self._swept(slot, clean))
        worker.start(wanted.secrets)
        try:
            self._check_name(name)  # again: another one may have started meanwhile
        except NameTaken:
            worker.kill()
            raise
        session = LiveSession(
            f"s-{secrets.token_hex(8)}",
            slot,
            worker,
            self._clock,
            name=name,
            secret_names=tuple(wanted.secrets),
            keep=wanted.keep,
            ttl_s=wanted.ttl_s,
            held_by=wanted.held_by,
        )
        self._by_id[session.core.session_id] = self._by_slot[slot] = session
        worker.attach(session.core)
        self._log.event("session_opened", session=session.core.session_id, slot=slot)
        return session

    def _check_name(self, name: str | None) -> None:
        taken = [each.core for each in self if each.core.name == name and each.core.lost is None]
        if name is not None and taken:
            holder = taken[0].held_by or "nobody"
            raise NameTaken(
                f"a session {name!r} is open already, held by {holder}; attach to it, or choose another name"
            )

    def memory_bytes(self, session: LiveSession) -> int | None:
        """Return what a session's worker takes, or None where that cannot be told."""
        return self._spawner.memory_bytes(session.core.slot) if session.core.lost is None else None

    def close(self, session_id: str) -> None:
        """End a session and wait until its slot is swept."""
        session = self[session_id]
        session.close()
        self._slots.wait_until_swept(session.core.slot)  # also where it was lost a moment ago
        self._by_id.pop(session_id, None)
        self._log.event("session_closed", session=session_id)

    def execution(self, execution_id: str) -> tuple[LiveSession, Execution]:
        """Find an execution by its id in any session.

        Raises:
            UnknownExecution: Never posted, or no longer stored.
        """
        for catch_up in (False, True):
            for session in self:
                if catch_up:
                    session.catch_up()
                execution = session.core.executions.get(execution_id)
                if execution is not None:
                    return session, execution
        raise UnknownExecution(f"no execution {execution_id[:64]!r}")

    def tool_call(self, call_id: str) -> tuple[LiveSession, ToolCall]:
        """Find a tool call by its id in any session.

        Raises:
            UnknownCall: Never made, or forgotten since.
        """
        for session in self:
            call = session.core.tool_calls.find(call_id)
            if call is not None:
                return session, call
        raise UnknownCall(f"no tool call {call_id[:64]!r}")

    def of_guest(self, peer: Peer) -> LiveSession:
        """Return the session whose process speaks on the guest's socket.

        Raises:
            UnknownSession: It belongs to none.
        """
        slot = self._spawner.slot_of(peer)
        session = None if slot is None else self._by_slot.get(slot)
        if session is None:
            raise UnknownSession("this process belongs to no session")
        return session

    def _sweeping(self, slot: int) -> None:
        self._slots.sweeping(slot)
        session = self._by_slot.pop(slot, None)
        if session is not None:
            self._log.event("session_lost", session=session.core.session_id, reason=session.core.lost)
            self._forget_old_ones()

    def _swept(self, slot: int, clean: bool) -> None:
        self._slots.swept(slot, clean)
        if not clean:
            self._log.event("slot_given_up", slot=slot)

    def _forget_old_ones(self) -> None:
        lost = [session for session in self if session.core.lost is not None]
        for session in lost[:-REMEMBERED_LOST_SESSIONS]:
            del self._by_id[session.core.session_id]
