"""All sessions of the sandbox, and the slots that they take."""

from __future__ import annotations

import heapq
import secrets
import time
from collections.abc import Iterator

from broker.errors import NameTaken, TooManySessions, UnknownCall, UnknownExecution, UnknownSession
from broker.executions import Execution
from broker.family import Family
from broker.live_session import LiveSession
from broker.logs import Log
from broker.protocol.messages import OpenRequest
from broker.snapshots import Snapshot
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
        # What runs in a slot; kept apart from lost sessions, whose slot may be another's by now.
        self._families: dict[int, Family] = {}

    def __len__(self) -> int:
        return sum(1 for family in self._families.values() for _ in family.sessions())

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
        family = self._new_family(self._slots.take())
        worker = family.start(wanted.secrets)
        try:
            self._check_name(name)  # again: another one may have started meanwhile
        except NameTaken:
            worker.kill()
            raise
        self._families[family.slot] = family
        session = self._add(
            LiveSession(
                _new_id(),
                family,
                worker,
                self._clock,
                name=name,
                secret_names=tuple(wanted.secrets),
                keep=wanted.keep,
                ttl_s=wanted.ttl_s,
                held_by=wanted.held_by,
            )
        )
        self._log.event("session_opened", session=session.core.session_id, slot=family.slot)
        return session

    def fork(self, session: LiveSession, count: int) -> list[LiveSession]:
        """Fork a session's worker, and return as many sessions that begin with its namespace; all, or none.

        Raises:
            SessionBusy: Code is running.
            TooManyForks: There would be more than may be.
            ForkFailed: There is no process or no memory to be had, or the worker does not answer.
            SessionLost: The namespace is gone.
        """
        copies: list[WorkerLink] = []
        try:
            with session.core.copying():
                copies.extend(session.family.fork(session.worker)[0] for _ in range(count))
        except BaseException:
            for copy in copies:
                copy.kill()
            raise
        return [self._add_fork(session, copy) for copy in copies]

    def snapshot(self, session: LiveSession, name: str | None) -> Snapshot:
        """Keep a frozen copy of a session's worker.

        Raises:
            TooManySnapshots: It has as many as it may.
            BrokerError: As ``fork``.
        """
        session.snapshots.check_room()
        copy = None
        try:
            with session.core.copying():
                copy, not_kept = session.family.fork(session.worker)
        except BaseException:
            if copy is not None:
                copy.kill()
            raise
        snapshot = session.snapshots.add(copy, not_kept, name)
        self._log.event("snapshot_taken", session=session.core.session_id, snapshot=snapshot.snapshot_id)
        return snapshot

    def roll_back(self, session: LiveSession, snapshot_id: str) -> None:
        """Replace a session's worker by a copy of one of its snapshots.

        Raises:
            UnknownSnapshot: It has none of this id.
            BrokerError: As ``fork``; the namespace is as it was.
        """
        snapshot = session.snapshots[snapshot_id]
        copy = None
        try:
            with session.core.copying():
                copy, _ = session.family.fork(snapshot.worker)
        except BaseException:
            if copy is not None:
                copy.kill()
            raise
        session.use_worker(copy)
        self._log.event("session_rolled_back", session=session.core.session_id, snapshot=snapshot_id)

    def _new_family(self, slot: int) -> Family:
        return Family(
            slot,
            self._spawner,
            on_lost=self._lost,
            on_sweep=lambda: self._sweeping(slot),
            on_swept=lambda clean: self._swept(slot, clean),
        )

    def _add(self, session: LiveSession) -> LiveSession:
        self._by_id[session.core.session_id] = session
        session.family.belongs(session.worker, session)
        session.worker.attach(session.core)
        return session

    def _add_fork(self, parent: LiveSession, copy: WorkerLink) -> LiveSession:
        core = parent.core
        session = self._add(
            LiveSession(
                _new_id(),
                parent.family,
                copy,
                self._clock,
                secret_names=core.secret_names,
                ttl_s=core.idleness.ttl_s,
                held_by=core.held_by,
                forked_from=core.session_id,
            )
        )
        self._log.event("session_forked", session=session.core.session_id, forked_from=core.session_id)
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
        pid = session.worker.pid
        return None if pid is None or session.core.lost is not None else self._spawner.memory_bytes(pid)

    def close(self, session_id: str) -> None:
        """End a session and wait until its slot is swept."""
        session = self[session_id]
        session.close()
        session.family.wait_until_gone(session.worker)
        if not any(session.family.sessions()):
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

    def tool_call(self, call_id: str, *, reads: bool = True) -> tuple[LiveSession, ToolCall]:
        """Find a tool call by its id in any session.

        Args:
            call_id: The call.
            reads: Read what the workers have said first, where it is not known: of a call on the lane the host may know
                before we do.

        Raises:
            UnknownCall: Never made, or forgotten since.
        """
        for catches_up in (False, True) if reads else (False,):
            for session in list(self):
                if catches_up:
                    session.catch_up()
                call = session.core.tool_calls.find(call_id)
                if call is not None:
                    return session, call
        raise UnknownCall(f"no tool call {call_id[:64]!r}")

    def of_guest(self, peer: Peer) -> Family:
        """Return the sessions whose processes may be speaking on the guest's socket: the call says which one.

        Raises:
            UnknownSession: It belongs to none.
        """
        slot = self._spawner.slot_of(peer)
        family = None if slot is None else self._families.get(slot)
        if family is None:
            raise UnknownSession("this process belongs to no session")
        return family

    def _lost(self, session: LiveSession) -> None:
        self._log.event("session_lost", session=session.core.session_id, reason=session.core.lost)
        self._forget_old_ones()

    def _sweeping(self, slot: int) -> None:
        self._slots.sweeping(slot)
        self._families.pop(slot, None)

    def _swept(self, slot: int, clean: bool) -> None:
        self._slots.swept(slot, clean)
        if not clean:
            self._log.event("slot_given_up", slot=slot)

    def _forget_old_ones(self) -> None:
        lost = [session for session in self if session.core.lost is not None]
        for session in lost[:-REMEMBERED_LOST_SESSIONS]:
            del self._by_id[session.core.session_id]


def _new_id() -> str:
    return f"s-{secrets.token_hex(8)}"
