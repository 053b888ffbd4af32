"""A session with its waiting: the core that never waits, and the requests that wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from broker.errors import SessionLost, TooManyCalls
from broker.executions import Execution
from broker.protocol import limits
from broker.protocol.frames import Blob
from broker.protocol.messages import (
    Attached,
    Claim,
    ClaimRequest,
    ExecuteRequest,
    Progress,
    StartedCall,
    ToolCallRequest,
    ToolCallStatus,
    ToolResult,
    Verdict,
)
from broker.session import Session
from broker.tool_calls import Clock, ToolCall
from broker.waiting import Alarm, Bell
from broker.worker_link import WorkerLink

#: A reply: the message, and the blobs that its values refer to.
WithBlobs = tuple[Progress, list[Blob]]
StatusWithBlobs = tuple[ToolCallStatus, Sequence[Blob]]


class LiveSession:
    """One session, as the handlers of both planes use it.

    Args:
        session_id: Given by the broker.
        slot: Its slot.
        worker: A started worker.
        clock: Monotonic seconds.
        name: Chosen by the host, or None.
        secret_names: Names of the secrets that its worker was given.
    """

    def __init__(
        self,
        session_id: str,
        slot: int,
        worker: WorkerLink,
        clock: Clock,
        *,
        name: str | None = None,
        secret_names: Sequence[str] = (),
    ) -> None:
        self._news = Bell()
        self._readers: dict[str, Bell] = {}
        self._incoming_bytes = 0
        self.core = Session(
            session_id,
            slot,
            worker,
            clock=clock,
            on_news=self._news.ring,
            on_call_ended=self._call_ended,
            on_deadline=self._deadline_moved,
            name=name,
            secret_names=secret_names,
        )
        self._alarm = Alarm(self.core.next_deadline, self.core.tick, clock)

    def attach(self, expected: int | None) -> Attached:
        """Give the session to a new client; requests of the old one that wait are refused at once."""
        started = self.core.attach(expected)
        execution = self.core.running or self.core.executions.latest()
        return Attached(
            epoch=self.core.epoch,
            execution_id=None if execution is None else execution.execution_id,
            running=execution is not None and execution.running,
            started=tuple(_started(call) for call in started),
        )

    def resolve_call(self, call_id: str, attempt: int, verdict: Verdict) -> ToolCall:
        """Take the holder's word for a call that an older one had started."""
        return self.core.tool_calls.resolve(call_id, attempt, verdict)

    def run(
        self, request: ExecuteRequest, blobs: Sequence[Blob], wanted: ClaimRequest, still_there: Callable[[], bool]
    ) -> WithBlobs:
        """Start an execution and wait for its first tool calls or its end.

        Args:
            request: The execution.
            blobs: Raw parts of its variables.
            wanted: How long to wait, and which claims to take.
            still_there: Tells whether whoever asked can still be answered; else no call is handed out.
        """
        return self._progress(self.core.execute(request, blobs), wanted, still_there)

    def claim(self, wanted: ClaimRequest, still_there: Callable[[], bool]) -> WithBlobs:
        """Renew leases, then wait for tool calls or for the execution's end."""
        execution = self.core.find(wanted.execution_id)
        lost = self.core.tool_calls.renew(wanted.renew, wanted.lease_s) if wanted.renew else []
        return self._progress(execution, wanted, still_there, tuple(lost))

    def wait_for_end(self, execution: Execution, wait_s: float) -> WithBlobs:
        """Wait for the end of an execution, claiming nothing."""
        return self._progress(execution, ClaimRequest(limit=0, wait_s=wait_s), lambda: True)

    def interrupt(self, execution: Execution) -> WithBlobs:
        """Ask a running execution to stop; say how it stands."""
        self.core.interrupt(execution)
        return self.wait_for_end(execution, 0.0)

    def finish_call(self, call_id: str, answer: ToolResult, blobs: Sequence[Blob], size: int) -> ToolCall:
        """Store the host's answer to a claim."""
        return self.core.tool_calls.finish(call_id, answer, blobs, size=size)

    def renew_call(self, call_id: str, attempt: int, lease_s: float) -> bool:
        """Prolong one lease; tell whether it was still held."""
        lost = self.core.tool_calls.renew([(call_id, attempt)], lease_s)
        self._alarm.check()
        return not lost

    def call_tool(self, request: ToolCallRequest, blobs: Sequence[Blob], size: int) -> StatusWithBlobs:
        """Queue a tool call of generated code and wait for its outcome."""
        return self.wait_for_call(self.core.submit(request, blobs, size), request.wait_s)

    def wait_for_call(self, call: ToolCall, wait_s: float) -> StatusWithBlobs:
        """Wait for the outcome of a tool call."""
        if not call.ended and wait_s > 0:
            bell = self._readers.setdefault(call.call_id, Bell())
            bell.wait_until(lambda: call.ended, min(wait_s, limits.MAX_WAIT_S))
        if call.ended:
            self.core.tool_calls.note_read(call)
        return ToolCallStatus(
            call_id=call.call_id, state=call.state, value=call.value, error=call.error
        ), call.value_blobs

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

    def close(self) -> None:
        """End the session; whoever waits is answered."""
        self.core.close()
        self._alarm.close()

    def _progress(
        self,
        execution: Execution | None,
        wanted: ClaimRequest,
        still_there: Callable[[], bool],
        lost: tuple[str, ...] = (),
    ) -> WithBlobs:
        queue, core = self.core.tool_calls, self.core
        epoch = core.epoch  # the caller's, checked a moment ago

        def ready() -> bool:
            ended = core.lost is not None if execution is None else execution.result is not None
            return ended or core.epoch != epoch or (wanted.limit > 0 and queue.claimable > 0)

        wait_s = min(wanted.wait_s, limits.MAX_WAIT_S)
        if wait_s > 0:
            self._news.wait_until(ready, wait_s)
        if execution is None and core.lost is not None:  # an execution tells it in its result
            raise SessionLost(core.lost)
        if wanted.limit:
            core.check_epoch(epoch)
        taken: list[ToolCall] = []
        if wanted.limit and queue.claimable and still_there():
            taken = queue.claim(limit=wanted.limit, lease_s=wanted.lease_s, start=wanted.start)
        self._alarm.check()
        return _pack(execution, taken, wanted.lease_s, lost)

    def _call_ended(self, call: ToolCall) -> None:
        bell = self._readers.pop(call.call_id, None)
        if bell is not None:
            bell.ring()

    def _deadline_moved(self) -> None:
        self._alarm.check()


def _started(call: ToolCall) -> StartedCall:
    return StartedCall(
        call_id=call.call_id,
        attempt=call.attempt,
        key=call.key,
        tool=call.request.tool,
        execution_id=call.request.execution_id,
        idempotent=call.idempotent,
    )


def _pack(execution: Execution | None, taken: Sequence[ToolCall], lease_s: float, lost: tuple[str, ...]) -> WithBlobs:
    """Return the reply; the result's blobs come first, each claim's after them in order."""
    blobs: list[Blob] = [] if execution is None else list(execution.blobs)
    claims = []
    for call in taken:
        first = len(blobs)
        blobs.extend(call.blobs)
        claims.append(
            Claim(
                call_id=call.call_id,
                attempt=call.attempt,
                tool=call.request.tool,
                args=call.request.args,
                kwargs=call.request.kwargs,
                execution_id=call.request.execution_id,
                lease_s=lease_s,
                blob_range=(first, len(blobs)),
                key=call.key,
            )
        )
    if execution is None:
        return Progress(execution_id=None, running=False, claims=tuple(claims), lost=lost), blobs
    return (
        Progress(
            execution_id=execution.execution_id,
            running=execution.running,
            result=execution.result,
            claims=tuple(claims),
            lost=lost,
        ),
        blobs,
    )
