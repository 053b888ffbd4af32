"""A session with its waiting: the core that never waits, and the requests that wait for it.

Every request comes in two forms. ``..._later`` is given a function that takes the answer, now or when it is there;
the other one waits for it in the calling greenlet.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

from broker.errors import BrokerError, SessionLost
from broker.executions import Execution
from broker.family import Family
from broker.lull import Bell, Line, Lull, manners
from broker.protocol import limits
from broker.protocol.blob_file import BlobFile, Blobs, as_views
from broker.protocol.frames import Blob
from broker.protocol.messages import (
    Attached,
    Claim,
    ClaimRequest,
    ExecuteRequest,
    HeldBy,
    Progress,
    StartedCall,
    ToolCallRequest,
    ToolCallStatus,
    ToolResult,
    Verdict,
)
from broker.session import Session
from broker.snapshots import Snapshots
from broker.tool_calls import Clock, ToolCall
from broker.waiting import Alarm, Deliver, Waiter, WaitingRoom, in_greenlet
from broker.worker_link import WorkerLink

#: A reply: the message, and the blobs that its values refer to.
WithBlobs = tuple[Progress, Blobs]
StatusWithBlobs = tuple[ToolCallStatus, Blobs]

#: What those wait for who want claims or an execution's end; the others wait for a call, by its id.
_NEWS = ""


class LiveSession:
    """One session, as the handlers of both planes use it.

    Args:
        session_id: Given by the broker.
        family: What its worker belongs to.
        worker: A started worker.
        clock: Monotonic seconds.
        name: Chosen by the host, or None.
        secret_names: Names of the secrets that its worker was given.
        keep: Whether clients leave it as it is when they go.
        ttl_s: Idle time in seconds after which it ends, or None.
        held_by: Who opened it, or None.
        forked_from: Id of the session that its worker was forked from, or None.

    Attributes:
        worker: The one that it has now.
        snapshots: Frozen copies of it.
    """

    def __init__(
        self,
        session_id: str,
        family: Family,
        worker: WorkerLink,
        clock: Clock,
        *,
        name: str | None = None,
        secret_names: Sequence[str] = (),
        keep: bool = False,
        ttl_s: float | None = None,
        held_by: HeldBy | None = None,
        forked_from: str | None = None,
    ) -> None:
        self._room = WaitingRoom(clock)
        self.worker, self.family, self.forked_from = worker, family, forked_from
        self.snapshots = Snapshots(session_id)
        # The connection on which the host announces what it sends on the lane.
        self._host: Line | None = None
        self._bell: Bell | None = None
        self._lull = Lull(self._lines, self._read_lines)
        self.core = Session(
            session_id,
            family.slot,
            worker,
            clock=clock,
            on_news=self._there_is_news,
            on_call_ended=self._call_ended,
            on_deadline=self._deadline_moved,
            catch_up=self.catch_up,
            name=name,
            secret_names=secret_names,
            keep=keep,
            ttl_s=ttl_s,
            held_by=held_by,
        )
        self._alarm = Alarm(self.core.next_deadline, self.core.tick, clock)
        self._alarm.check()

    def attach(self, expected: int | None, held_by: HeldBy | None = None) -> Attached:
        """Give the session to a new client; requests of the old one that wait are refused at once."""
        if expected is not None:
            self.core.check_epoch(expected)  # who is refused ends no lane
        # First: of a tool call that got to the old client, the worker had told us before.
        self.end_lane()
        self.catch_up()  # what the old one has begun was begun, also where it is not read yet
        started = self.core.attach(expected, held_by)
        # Of a session that has only rehearsed there is nothing to resume.
        execution = self.core.running or (self.core.executions.latest() if self.core.executed else None)
        return Attached(
            epoch=self.core.epoch,
            execution_id=None if execution is None else execution.execution_id,
            running=execution is not None and execution.running,
            started=tuple(_started(call) for call in started),
        )

    def detach(self) -> None:
        """Let go of the session for whoever holds it; it goes on with what it does."""
        self.end_lane()
        self.catch_up()
        self.core.detach()

    def resolve_call(self, call_id: str, attempt: int, verdict: Verdict) -> ToolCall:
        """Take the holder's word for a call that an older one had started."""
        return self.core.tool_calls.resolve(call_id, attempt, verdict)

    def run(
        self, request: ExecuteRequest, blobs: Sequence[Blob], wanted: ClaimRequest, still_there: Callable[[], bool]
    ) -> WithBlobs:
        """Start an execution and wait for its first tool calls or its end; see ``run_later``."""
        answer: WithBlobs = in_greenlet(
            self._room, lambda deliver: self.run_later(request, blobs, wanted, still_there, _as_bytes(deliver))
        )
        return answer

    def run_later(
        self,
        request: ExecuteRequest,
        blobs: Blobs,
        wanted: ClaimRequest,
        still_there: Callable[[], bool],
        deliver: Deliver[WithBlobs | None],
        *,
        stream: bool = False,
        on_lane: bool = False,
    ) -> Waiter | None:
        """Start an execution, and deliver its first tool calls or its end.

        Args:
            request: The execution.
            blobs: Raw parts of its variables.
            wanted: How long to wait, and which claims to take.
            still_there: Tells whether whoever asked can still be answered; else no call is handed out.
            deliver: Takes the answer.
            stream: Deliver again and again, each time with new claims, until the execution's end or the end of the
                wait; all but the last answer say ``more``.
            on_lane: The worker has it from the host itself, and may answer it itself: then ``None`` is delivered.
        """
        execution = self.core.execute(request, blobs, on_lane=on_lane)
        if execution.on_lane:
            self._lull.begin()
        else:
            self._lull.end()  # its end is news for us alone
        return self._progress_later(execution, wanted, still_there, deliver, stream=stream, on_lane=on_lane)

    def claim(self, wanted: ClaimRequest, still_there: Callable[[], bool]) -> WithBlobs:
        """Renew leases, then wait for tool calls or for the execution's end."""
        answer: WithBlobs = in_greenlet(
            self._room, lambda deliver: self.claim_later(wanted, still_there, _as_bytes(deliver))
        )
        return answer

    def claim_later(
        self,
        wanted: ClaimRequest,
        still_there: Callable[[], bool],
        deliver: Deliver[WithBlobs | None],
        *,
        stream: bool = False,
    ) -> Waiter | None:
        """Renew leases, and deliver tool calls or the execution's end; see ``run_later``."""
        execution = self.core.find(wanted.execution_id)
        lost = self.core.tool_calls.renew(wanted.renew, wanted.lease_s) if wanted.renew else []
        return self._progress_later(execution, wanted, still_there, deliver, lost=tuple(lost), stream=stream)

    def wait_for_end(self, execution: Execution, wait_s: float) -> WithBlobs:
        """Wait for the end of an execution, claiming nothing."""
        wanted = ClaimRequest(limit=0, wait_s=wait_s)
        self.catch_up()
        answer: WithBlobs = in_greenlet(
            self._room, lambda deliver: self._progress_later(execution, wanted, lambda: True, _as_bytes(deliver))
        )
        return answer

    def interrupt(self, execution: Execution) -> WithBlobs:
        """Ask a running execution to stop; say how it stands."""
        self.core.interrupt(execution)
        return self.wait_for_end(execution, 0.0)

    def finish_call(self, call_id: str, answer: ToolResult, blobs: Blobs, size: int) -> ToolCall:
        """Store the host's answer to a claim; generated code has it before the host is told so."""
        call = self.core.tool_calls.finish(call_id, answer, blobs, size=size)
        self._room.answer_now(call_id)
        return call

    def claim_one(self, still_there: Callable[[], bool]) -> WithBlobs | None:
        """Claim the next call for whoever has just answered one, if there is any; it counts as started."""
        queue = self.core.tool_calls
        if not queue.claimable or not still_there():
            return None
        taken = queue.claim(limit=1, lease_s=limits.DEFAULT_LEASE_S, start=True)
        self._alarm.check()
        return _pack(None, taken, limits.DEFAULT_LEASE_S, (), more=False)

    def renew_call(self, call_id: str, attempt: int, lease_s: float) -> bool:
        """Prolong one lease; tell whether it was still held."""
        lost = self.core.tool_calls.renew([(call_id, attempt)], lease_s)
        self._alarm.check()
        return not lost

    def call_tool(self, request: ToolCallRequest, blobs: Sequence[Blob], size: int) -> StatusWithBlobs:
        """Queue a tool call of generated code and wait for its outcome."""
        return self.wait_for_call(self.core.submit(request, blobs, size), request.wait_s)

    def call_tool_later(
        self, request: ToolCallRequest, blobs: Blobs, size: int, deliver: Deliver[StatusWithBlobs]
    ) -> Waiter | None:
        """Queue a tool call of generated code, and deliver its outcome."""
        return self.wait_for_call_later(self.core.submit(request, blobs, size), request.wait_s, deliver)

    def wait_for_call(self, call: ToolCall, wait_s: float) -> StatusWithBlobs:
        """Wait for the outcome of a tool call."""
        answer: StatusWithBlobs = in_greenlet(
            self._room, lambda deliver: self.wait_for_call_later(call, wait_s, _as_bytes(deliver))
        )
        return answer

    def offer_again(self, call: ToolCall) -> None:
        """Hand a call out that went by the lane, where its caller has reason to think that it did not get there."""
        self.core.tool_calls.offer_again(call)

    def wait_for_call_later(self, call: ToolCall, wait_s: float, deliver: Deliver[StatusWithBlobs]) -> Waiter | None:
        """Deliver the outcome of a tool call, or how it stands when the time is up."""

        def look(time_is_up: bool) -> bool:
            if not call.ended and not time_is_up:
                return False
            if call.ended:
                self.core.tool_calls.note_read(call)
            status = ToolCallStatus(call_id=call.call_id, state=call.state, value=call.value, error=call.error)
            deliver((status, call.value_blobs))
            return True

        return self._room.wait(call.call_id, look, min(wait_s, limits.MAX_WAIT_S))

    def open_lane(self, host: Line) -> socket.socket:
        """Make a lane from the host to the worker; return the host's end.

        Args:
            host: The connection that this was asked on, on which the host will announce what it sends on the lane.

        Raises:
            SessionLost: There is no worker any more.
        """
        if self.core.lost is not None:
            raise SessionLost(self.core.lost)
        self._lull.end()
        self._host = host
        if self._bell is None:
            self._bell = Bell(self._rung)
        return self.worker.open_lane(self._bell)

    def catch_up(self) -> None:
        """Somebody speaks of what has not been read yet: read what came before it, in order."""
        self._read_lines()

    def end_lane(self) -> None:
        """End the lane: nothing runs that comes on it from now on."""
        self._lull.end()
        self.worker.close_lane()

    def _lines(self) -> tuple[Line, ...]:
        return (self.worker,) if self._host is None else (self.worker, self._host)

    def _read_lines(self) -> bool:
        if self._host is None:
            return False
        from_worker = self.worker.read_now()
        self._room.answer_rung()
        return self._host.read_now() or from_worker

    def _rung(self) -> None:
        """The worker has told us what it has told nobody else."""
        self._lull.end()
        with manners.kept():
            self._read_lines()

    def stop_waiting(self, waiter: Waiter) -> None:
        """Forget a request whose connection is gone."""
        self._room.leave(waiter)

    def use_worker(self, worker: WorkerLink) -> None:
        """Go on with another worker, in place of the one before, which is ended."""
        self._lull.end()
        old, self.worker = self.worker, worker
        self.family.belongs(old, None)
        self.family.belongs(worker, self)
        self.core.use_worker(worker)
        old.kill()
        worker.attach(self.core)

    def close(self) -> None:
        """End the session; whoever waits is answered."""
        self.core.close()
        self._room.close()
        self._alarm.close()
        self._lull.close()
        if self._bell is not None:
            self._bell.close()
        self.core.files.close()

    def _progress_later(
        self,
        execution: Execution | None,
        wanted: ClaimRequest,
        still_there: Callable[[], bool],
        deliver: Deliver[WithBlobs | None],
        *,
        lost: tuple[str, ...] = (),
        stream: bool = False,
        on_lane: bool = False,
    ) -> Waiter | None:
        core, queue = self.core, self.core.tool_calls
        epoch = core.epoch  # the caller's, checked a moment ago

        def look(time_is_up: bool) -> bool:
            while True:
                ended = core.lost is not None if execution is None else execution.result is not None
                # Where more answers can follow, the limit is for calls held at once, not for one answer.
                room = wanted.limit - queue.held if stream else wanted.limit
                claimable = room > 0 and queue.claimable > 0
                if not (ended or time_is_up or claimable or core.epoch != epoch):
                    return False
                if on_lane and execution is not None and execution.told:
                    deliver(None)
                    return True
                try:
                    if execution is None and core.lost is not None:  # an execution tells it in its result
                        raise SessionLost(core.lost)
                    if wanted.limit:
                        core.check_epoch(epoch)
                except BrokerError as error:
                    deliver(error)
                    return True
                taken: list[ToolCall] = []
                if claimable and still_there():
                    taken = queue.claim(limit=room, lease_s=wanted.lease_s, start=wanted.start)
                    self._alarm.check()
                more = stream and bool(taken) and not (ended or time_is_up)
                deliver(_pack(execution, taken, wanted.lease_s, lost, more=more))
                if not (more and queue.stopped_at_file):  # else there may be calls behind it
                    return not more

        waiter = self._room.wait(_NEWS, look, min(wanted.wait_s, limits.MAX_WAIT_S))
        if wanted.renew:
            self._alarm.check()
        return waiter

    def _there_is_news(self) -> None:
        self._room.ring(_NEWS)

    def _call_ended(self, call: ToolCall) -> None:
        self._room.ring(call.call_id)
        self._room.ring(_NEWS)  # who holds as many calls as it may has room for another one

    def _deadline_moved(self) -> None:
        self._alarm.check()


def _as_bytes(deliver: Deliver[Any]) -> Deliver[Any]:
    """Return what takes an answer for HTTP: by the time that a greenlet sends it, its file may be closed."""

    def with_views(answer: Any) -> None:
        deliver(answer if isinstance(answer, BrokerError) else (answer[0], as_views(answer[1])))

    return with_views


def _started(call: ToolCall) -> StartedCall:
    return StartedCall(
        call_id=call.call_id,
        attempt=call.attempt,
        key=call.key,
        tool=call.request.tool,
        execution_id=call.request.execution_id,
        idempotent=call.idempotent,
    )


def _pack(
    execution: Execution | None, taken: Sequence[ToolCall], lease_s: float, lost: tuple[str, ...], *, more: bool
) -> WithBlobs:
    """Return the reply; the result's blobs come first, each claim's after them in order."""
    blobs: Blobs = () if execution is None else execution.blobs
    own: list[Blob] = []
    claims = []
    for call in taken:
        first = len(blobs) + len(own)
        if type(call.blobs) is BlobFile:
            blobs = call.blobs  # alone: see ToolCallQueue.claim
        else:
            own += call.blobs
        claims.append(
            Claim(
                call_id=call.call_id,
                attempt=call.attempt,
                tool=call.request.tool,
                args=call.request.args,
                kwargs=call.request.kwargs,
                execution_id=call.request.execution_id,
                lease_s=lease_s,
                blob_range=(first, len(blobs) + len(own)),
                key=call.key,
            )
        )
    if own:
        blobs = [*as_views(blobs), *own]
    if execution is None:
        return Progress(execution_id=None, running=False, claims=tuple(claims), lost=lost, more=more), blobs
    return (
        Progress(
            execution_id=execution.execution_id,
            running=execution.running,
            result=execution.result,
            claims=tuple(claims),
            lost=lost,
            more=more,
            lane=execution.kept_pipe,
        ),
        blobs,
    )
