"""The workers of one slot: a session's first, and those forked from it and from each other since.

They share the slot's user, so they are one trust domain: the kernel keeps them from other families, not from each
other. The slot is swept when the last of them has ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from broker.errors import ExecutionEnded, TooManyCalls, TooManyForks, UnknownCall
from broker.protocol import limits
from broker.spawner import WorkerSpawner
from broker.waiting import Bell
from broker.worker_link import WorkerLink

if TYPE_CHECKING:
    from broker.live_session import LiveSession

#: A process that was killed is gone in milliseconds; one that is stuck in the kernel may take longer.
_END_WAIT_S = 5.0


class Family:
    """Everything in one slot.

    Args:
        slot: The slot.
        spawner: Where its workers come from.
        on_lost: Told of each session whose worker has ended.
        on_sweep: Told that the last worker has ended, and the slot is being swept.
        on_swept: Told whether nothing is left of it.
    """

    def __init__(
        self,
        slot: int,
        spawner: WorkerSpawner,
        *,
        on_lost: Callable[[LiveSession], None],
        on_sweep: Callable[[], None],
        on_swept: Callable[[bool], None],
    ) -> None:
        self.slot = slot
        self._spawner = spawner
        self._on_lost, self._on_sweep, self._on_swept = on_lost, on_sweep, on_swept
        # Those that live, each with its session; a snapshot has none, nor has one that is just being forked.
        self._members: dict[WorkerLink, LiveSession | None] = {}
        self._ending: set[WorkerLink] = set()
        self._changed = Bell()
        self._incoming_bytes = 0
        self._over = False

    def sessions(self) -> Iterator[LiveSession]:
        """Return the sessions that live."""
        return (session for session in list(self._members.values()) if session is not None)

    def start(self, secrets: Mapping[str, str]) -> WorkerLink:
        """Start the first worker, and wait until it is ready.

        Raises:
            SessionStartFailed: It did not start.
        """
        link = self._new()
        link.start(secrets)
        return link

    def fork(self, link: WorkerLink) -> tuple[WorkerLink, tuple[str, ...]]:
        """Let a worker that runs nothing fork; return its copy, ready, and the names of what that lacks.

        Raises:
            TooManyForks: There are as many as may be.
            ForkFailed: There is no copy; the worker is as it was.
        """
        if len(self._members) >= limits.MAX_FAMILY:
            raise TooManyForks(
                f"{limits.MAX_FAMILY} sessions and snapshots come from one session already; "
                "close branches and drop snapshots that are no longer needed"
            )
        copy = self._new()
        return copy, link.copy_to(copy)

    def belongs(self, link: WorkerLink, session: LiveSession | None) -> None:
        """Note which session a worker is; None: a snapshot's, or one that is about to be ended."""
        if link in self._members:
            self._members[link] = session

    def wait_until_gone(self, link: WorkerLink) -> None:
        """Wait for the end of a worker that was killed while others live."""
        self._changed.wait_until(lambda: link not in self._ending, _END_WAIT_S)

    # What the guest plane asks: the kernel says which family speaks, the call names its execution.

    def running(self, execution_id: str) -> LiveSession:
        """Return the session that runs an execution.

        Raises:
            ExecutionEnded: None does.
        """
        for catch_up in (False, True):
            for session in self.sessions():
                if catch_up:
                    session.catch_up()
                running = session.core.running
                if running is not None and running.execution_id == execution_id:
                    return session
        raise ExecutionEnded("the execution that this call belongs to has ended")

    def of_call(self, call_id: str) -> LiveSession:
        """Return the session that a tool call was made in.

        Raises:
            UnknownCall: None of these.
        """
        for session in self.sessions():
            if session.core.tool_calls.find(call_id) is not None:
                return session
        for session in self.sessions():
            session.catch_up()  # the worker may have told of it on its channel, which is not read yet
            if session.core.tool_calls.find(call_id) is not None:
                return session
        raise UnknownCall(f"no tool call {call_id[:64]!r}")

    @contextlib.contextmanager
    def receiving(self, size: int) -> Iterator[None]:
        """Reserve room for a request of generated code while its body is read.

        Raises:
            TooManyCalls: More bytes than one call may have are on their way already.
        """
        if self._incoming_bytes and self._incoming_bytes + size > limits.MAX_TOOL_CALL_BYTES:
            raise TooManyCalls(f"more than {limits.MAX_TOOL_CALL_BYTES} bytes of tool arguments are on their way")
        self._incoming_bytes += size
        try:
            yield
        finally:
            self._incoming_bytes -= size

    def _new(self) -> WorkerLink:
        link = WorkerLink(self.slot, self._spawner, self._killed)
        self._members[link] = None
        return link

    def _killed(self, link: WorkerLink) -> None:
        if link not in self._members:
            return
        session = self._members.pop(link)
        if session is not None:
            session.snapshots.drop_all()
            self._on_lost(session)
        if not self._members:
            if not self._over:
                self._sweep()
        elif link.pid is not None:
            self._ending.add(link)
            self._spawner.end(self.slot, link.pid, lambda: self._gone(link))

    def _gone(self, link: WorkerLink) -> None:
        link.gone()
        self._ending.discard(link)
        self._changed.ring()

    def _sweep(self) -> None:
        self._over = True
        self._ending.clear()
        self._changed.ring()
        self._on_sweep()
        self._spawner.sweep(self.slot, self._on_swept)
