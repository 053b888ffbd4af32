"""One session: its worker, its executions, its tool calls. Never waits, knows no transport.

What comes from the worker is hostile: a frame that fits no running execution is dropped, a frame
that breaks the format ends the session.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from broker.errors import (
    ExecutionEnded,
    Fenced,
    SessionBusy,
    SessionLost,
    TooManyCalls,
    UnknownExecution,
    UnknownTool,
)
from broker.executions import Execution, ExecutionStore, explain
from broker.held_files import HeldFiles
from broker.idleness import Idleness
from broker.output import Output
from broker.protocol import limits, reading
from broker.protocol.blob_file import BlobFile, Blobs
from broker.protocol.messages import (
    CallState,
    ErrorInfo,
    ExecuteRequest,
    ExecutionResult,
    HeldBy,
    Outcome,
    ToolCallRequest,
    lane_call_id,
)
from broker.stopwatch import Stopwatch
from broker.tool_calls import Clock, ToolCall, ToolCallQueue

JsonObject = dict[str, Any]

#: The channel's end is seen before the supervisor's word why; a worker that closed it but lives breaks the protocol.
EXIT_REASON_WAIT_S = 0.5

#: A worker sends one frame for each execution. A few may be late; a flood of them is meant to keep us busy.
MAX_STRAY_FRAMES = 100

#: Why a session is lost whose time to live is over.
EXPIRED = "expired"

#: Why the session is lost when the worker did not stop in time.
_IGNORED_INTERRUPT = {
    Outcome.TIMED_OUT: "deadline",
    Outcome.INTERRUPTED: "interrupted",
    Outcome.OUTPUT_LIMIT: "output_limit",
}


class Worker(Protocol):
    """What a session asks of its worker. Nothing here waits."""

    def execute(self, header: JsonObject, blobs: Blobs, *, max_output_bytes: int) -> None:
        """Send an execute frame; what the execution prints is kept apart from what came before."""

    def leave_to_lane(self, *, max_output_bytes: int) -> bool:
        """Prepare for an execution that comes to the worker on the lane; tell whether it may."""

    def execute_left(self, header: JsonObject, blobs: Blobs) -> None:
        """Send the frame of an execution that was left to the lane."""

    def interrupt(self) -> None:
        """Send SIGINT; ``Session.interrupt_delivered`` is called once it was sent."""

    def take_output(self, rest: str, *, keep: bool) -> Output:
        """Return what the execution printed, up to now; what comes later is thrown away.

        Args:
            rest: The last of it, as the worker says, which has taken it out of the pipe itself.
            keep: The next execution shall print into the same pipe, which nobody else holds.
        """

    def leave_output(self, printed: str) -> Output:
        """Return what the execution printed, which the worker has told; what is in its pipe is of the next one."""

    def kill(self) -> None:
        """Kill every process of the session and remove its files."""


@dataclasses.dataclass(slots=True)
class _Report:
    """A worker's result frame, checked."""

    outcome: Outcome
    value: Any
    display: str | None
    error: ErrorInfo | None
    blobs: Blobs
    printed: str
    keeps_pipe: bool
    told: bool


class Session:
    """One REPL namespace and what runs in it.

    Args:
        session_id: Given by the broker.
        slot: Place in the sandbox; decides the worker's uid.
        worker: Its worker.
        clock: Monotonic seconds.
        on_news: Told when a call became claimable or an execution ended.
        on_call_ended: Told of each tool call that reached a terminal state.
        on_deadline: Told that ``next_deadline`` may have moved.
        catch_up: Called when the worker or its code speak of an unknown execution: the host's word of it, which was
            sent before, is read now.
        name: Chosen by the host, to find the session by; or None.
        secret_names: Names of the secrets that the worker was given.
        keep: Whether clients leave it as it is when they go.
        ttl_s: Idle time in seconds after which it ends, or None.
        held_by: Who opened it, or None.

    Attributes:
        epoch: Counts the clients that held the session; the newest one alone is listened to.
        executed: How many executions were started.
    """

    def __init__(
        self,
        session_id: str,
        slot: int,
        worker: Worker,
        *,
        clock: Clock = time.monotonic,
        on_news: Callable[[], None] = lambda: None,
        on_call_ended: Callable[[ToolCall], None] = lambda call: None,
        on_deadline: Callable[[], None] = lambda: None,
        catch_up: Callable[[], None] = lambda: None,
        name: str | None = None,
        secret_names: Sequence[str] = (),
        keep: bool = False,
        ttl_s: float | None = None,
        held_by: HeldBy | None = None,
    ) -> None:
        self.session_id, self.slot, self.name = session_id, slot, name
        self.secret_names = tuple(secret_names)
        self.keep, self.held_by = keep, held_by
        self.idleness = Idleness(ttl_s, clock)
        self.executed = 0
        self.epoch = 1
        self.lost: str | None = None
        self.created_at = clock()
        self.files = HeldFiles()
        self.executions = ExecutionStore(self.files)
        self.tool_names: frozenset[str] = frozenset()
        self._idempotent: frozenset[str] = frozenset()
        self.tool_calls = ToolCallQueue(
            clock=clock, on_queued=self._call_queued, on_ended=self._call_ended, files=self.files
        )
        self._worker, self._clock = worker, clock
        self._on_news, self._on_call_ended, self._on_deadline = on_news, on_call_ended, on_deadline
        self._catch_up = catch_up
        self._running: Execution | None = None
        # SIGINTs that the supervisor has not sent yet. Until it has, the next execution must not start: it would
        # be the one that is interrupted. A result that arrives meanwhile waits in _held_back.
        self._interrupts_on_their_way = 0
        self._held_back: _Report | None = None
        self._channel_closed_at: float | None = None
        self._stray_frames = 0
        self._copying = False

    @property
    def running(self) -> Execution | None:
        """The execution that runs now."""
        return self._running

    def attach(self, expected: int | None, held_by: HeldBy | None = None) -> list[ToolCall]:
        """Give the session to a new client, and return the calls that the old one had started.

        Args:
            expected: The epoch that the caller has seen; None to take the session whoever has it.
            held_by: The new client, or None.

        Raises:
            Fenced: Somebody else attached since.
            SessionLost: The namespace is gone.
        """
        if self.lost is not None:
            raise SessionLost(self.lost)
        if expected is not None:
            self.check_epoch(expected)
        return self._hand_over(held_by)

    def detach(self) -> None:
        """Take the session from its client, which lets go of it; what runs goes on, for whoever attaches."""
        if self.lost is None:
            self._hand_over(None)
        self.held_by = None

    def check_epoch(self, epoch: int) -> None:
        """Refuse a client that does not hold the session (any more).

        Raises:
            Fenced: It is of another epoch.
        """
        if epoch != self.epoch:
            raise Fenced(
                f"another client holds this session: this request is of epoch {epoch}, the session of {self.epoch}"
            )

    def age_s(self) -> float:
        """Return the seconds since the session was opened."""
        return self._clock() - self.created_at

    def idle_s(self) -> float:
        """Return for how long nothing has been running or done, in seconds."""
        return 0.0 if self._running is not None else self.idleness.idle_s()

    def execute(self, request: ExecuteRequest, blobs: Blobs, *, on_lane: bool = False) -> Execution:
        """Start an execution; an id that is known already gives that execution and runs nothing.

        Args:
            request: The execution.
            blobs: Raw parts of its variables.
            on_lane: The host sends it to the worker itself, at the same time; so it is left alone for a moment.

        Raises:
            SessionBusy: Another one is running.
            SessionLost: The namespace is gone.
        """
        if not on_lane:
            self._catch_up()
        known = self.executions.get(request.execution_id)
        if known is not None:
            return known
        self._check_free()
        if request.tools is not None:
            # One with source runs in the worker: a call of it that comes to the broker is forged.
            self.tool_names = frozenset(tool.name for tool in request.tools if tool.source is None)
            self._idempotent = frozenset(tool.name for tool in request.tools if tool.idempotent)
        execution = Execution.of(request, self._clock(), Stopwatch(request.timeout_s, self._clock))
        execution.announced = on_lane
        self._running = execution
        self.executed += bool(request.code)  # a rehearsal runs none
        self.executions.add(execution)
        header = request.to_worker()
        if on_lane and self._worker.leave_to_lane(max_output_bytes=request.max_output_bytes):
            execution.on_lane = True
            execution.left = header, self.files.keep(blobs) if isinstance(blobs, BlobFile) else blobs
            execution.forward_at = self._clock() + limits.LANE_PATIENCE_S
        else:
            self._worker.execute(header, blobs, max_output_bytes=request.max_output_bytes)
        self._on_deadline()
        return execution

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Keep executions off while the worker, or a snapshot of it, is forked.

        Raises:
            SessionBusy: One is running.
            SessionLost: The namespace is gone, also where that happens in the block.
        """
        self._catch_up()
        self._check_free()
        self._copying = True
        try:
            yield
        finally:
            self._copying = False
            self.idleness.begin_anew()
            self._on_deadline()
            if self.lost is not None:
                raise SessionLost(self.lost)

    def use_worker(self, worker: Worker) -> None:
        """Go on with another worker; what the one before says counts no more."""
        self._worker = worker
        self._stray_frames = 0
        self._channel_closed_at = None

    def find(self, execution_id: str | None) -> Execution | None:
        """Return the execution of that id, or the running one for None.

        Raises:
            UnknownExecution: Never posted, or no longer stored.
        """
        if execution_id is None:
            return self._running
        execution = self.executions.get(execution_id)
        if execution is None:
            self._catch_up()
            execution = self.executions.get(execution_id)
        if execution is None:
            raise UnknownExecution(f"no execution {execution_id!r} in this session")
        return execution

    def submit(self, request: ToolCallRequest, blobs: Blobs, size: int) -> ToolCall:
        """Queue a tool call of generated code.

        Raises:
            ExecutionEnded: The caller's execution is not running (any more).
            UnknownTool: This execution has no such tool.
            TooManyCalls: The queue is full.
        """
        self._check_call(request)
        return self.tool_calls.submit(request, blobs, size=size, idempotent=request.tool in self._idempotent)

    def _check_call(self, request: ToolCallRequest) -> None:
        """Refuse what is no call of a tool by the execution that runs."""
        running = self._running
        if running is None or running.execution_id != request.execution_id:
            self._catch_up()
            running = self._running
        if running is None or running.execution_id != request.execution_id or not running.accepts_calls:
            raise ExecutionEnded("the execution that this call belongs to has ended")
        if request.tool not in self.tool_names:
            names = ", ".join(sorted(self.tool_names)) or "none"
            raise UnknownTool(f"there is no tool {request.tool!r}; the tools of this session: {names[:2000]}")

    def interrupt(self, execution: Execution) -> None:
        """Stop an execution at the host's request; one that has ended, or is being stopped, is left alone."""
        self._catch_up()
        if execution is self._running and execution.cause is None:
            self._stop(execution, Outcome.INTERRUPTED)

    def close(self) -> None:
        """End the session for good."""
        self._lose("shutdown")

    # What the worker and the supervisor tell.

    def frame_received(self, header: JsonObject, blobs: Blobs, size: int = 0) -> None:
        """Take a frame of so many bytes off the worker's channel."""
        if header.get("type") == "call":
            self._called(header, size)
            return
        if header.get("type") == "prints":
            self._prints(header)
            return
        if not self._awaited(header) or self.tool_calls.held:
            self._catch_up()  # the host's word, which was sent before: of the execution, or of a call's answer
        if not self._awaited(header):
            self._stray()
            return
        try:
            report = _read_report(header, blobs)
        except reading.BadRequest:
            self.protocol_broken()
            return
        if type(blobs) is BlobFile:
            report.blobs = self.files.keep(blobs)
        if self._interrupts_on_their_way:
            self._held_back = report
        else:
            self._finish(report)

    def _called(self, header: JsonObject, size: int) -> None:
        """Take in a tool call that the worker has told the host too, on the lane: there it has begun."""
        try:
            request = ToolCallRequest.from_json(header)
            call_id = lane_call_id(request)
            if size > limits.MAX_LANE_BYTES:
                raise reading.BadRequest("too large for the lane")
            self._check_call(request)
            if self._running is None or not self._running.announced:
                raise reading.BadRequest("its execution did not come on the lane")
            idempotent = request.tool in self._idempotent
            self.tool_calls.begun(call_id, request, size=size, idempotent=idempotent, lease_s=limits.DEFAULT_LEASE_S)
            self._watch_tools()
            self._on_deadline()
        except ExecutionEnded:
            if self.executions.get(str(header.get("execution_id"))) is None:
                self._stray()  # else a thread spoke while its execution ended
        except TooManyCalls:
            pass  # the host has refused it too, or will have its answer refused
        except (UnknownTool, reading.BadRequest):
            self._stray()

    def _prints(self, header: JsonObject) -> None:
        """The running execution fills its pipe: do not leave it to the lane any longer."""
        if self._running is None or self._running.execution_id != header.get("execution_id"):
            self._catch_up()
        running = self._running
        if running is None or running.execution_id != header.get("execution_id") or running.prints:
            self._stray()
            return
        running.prints = True
        self._forward(running)

    def _stray(self) -> None:
        self._stray_frames += 1
        if self._stray_frames > MAX_STRAY_FRAMES:
            self.protocol_broken()

    def _awaited(self, header: JsonObject) -> bool:
        """Tell whether a frame is the result of the running execution, and the first one."""
        running = self._running
        return (
            running is not None
            and self._held_back is None
            and header.get("type") == "result"
            and header.get("execution_id") == running.execution_id
        )

    def interrupt_delivered(self) -> None:
        """A SIGINT that was asked for has been sent."""
        self._interrupts_on_their_way = max(0, self._interrupts_on_their_way - 1)
        if self._held_back is not None and not self._interrupts_on_their_way:
            self._finish(self._held_back)

    def output_overflowed(self) -> None:
        """The execution printed more than is even thrown away."""
        if self._running is not None and self._running.cause is None:
            self._stop(self._running, Outcome.OUTPUT_LIMIT)

    def protocol_broken(self) -> None:
        """The worker sent something that is no frame, or closed its channel and lives."""
        self._lose("protocol")

    def channel_closed(self) -> None:
        """The channel is at its end; the reason follows, or the worker did it on purpose."""
        if self.lost is None and self._channel_closed_at is None:
            self._channel_closed_at = self._clock()
            self._on_deadline()

    def exited(self, reason: str) -> None:
        """The worker process has ended."""
        self._lose(reason)

    # Time.

    def next_deadline(self) -> float | None:
        """Return the clock time at which ``tick`` has something to do, or None."""
        times: list[float | None] = [self.tool_calls.next_lease_end()]
        if self._running is not None:
            running = self._running
            times.append(running.remind_at or running.kill_at or running.stopwatch.deadline())
            times.append(running.forward_at)
        elif self.lost is None:
            times.append(self.idleness.ends_at())
        if self._channel_closed_at is not None:
            times.append(self._channel_closed_at + EXIT_REASON_WAIT_S)
        return min((at for at in times if at is not None), default=None)

    def tick(self) -> None:
        """Do what is due: leases, the deadline, the kill after it, the end of a session that was idle for too long."""
        now = self._clock()
        self.tool_calls.expire_leases()
        if self._channel_closed_at is not None and now >= self._channel_closed_at + EXIT_REASON_WAIT_S:
            self.protocol_broken()
        running = self._running
        if running is None:
            ends_at = self.idleness.ends_at()
            if ends_at is not None and now >= ends_at:
                self._catch_up()
                if self._running is None:
                    self._lose(EXPIRED)
            return
        if running.forward_at is not None and now >= running.forward_at:
            self._catch_up()  # it may have ended long ago: what is read from the pipe from now on counts as its output
            if running.result is not None:
                return
            self._forward(running)
        deadline = running.stopwatch.deadline()
        if running.cause is None and deadline is not None and now >= deadline:
            self._stop(running, Outcome.TIMED_OUT)
        elif running.cause is not None and running.kill_at is not None and now >= running.kill_at:
            self._lose(_IGNORED_INTERRUPT[running.cause])
        elif running.remind_at is not None and now >= running.remind_at:
            running.remind_at = None
            self._interrupt()

    # Inside.

    def _check_free(self) -> None:
        """Refuse what needs a worker that does nothing."""
        if self.lost is not None:
            raise SessionLost(self.lost)
        if self._running is not None:
            raise SessionBusy(f"the execution {self._running.execution_id} is running in this session")
        if self._copying:
            raise SessionBusy("this session is being forked or rolled back")

    def _forward(self, execution: Execution) -> None:
        """Send what was left to the lane, and take care of its output; the worker throws away what it had already."""
        if execution.left is not None:
            self._worker.execute_left(*execution.left)
        self._let_go_of_left(execution)

    def _let_go_of_left(self, execution: Execution) -> None:
        """It is not, or no longer, needed for the worker."""
        if execution.left is not None:
            self.files.let_go(execution.left[1])
        execution.left = execution.forward_at = None

    def _hand_over(self, held_by: HeldBy | None) -> list[ToolCall]:
        self.epoch += 1
        self.held_by = held_by
        self.idleness.begin_anew()
        started = self.tool_calls.take_over()
        self._on_deadline()
        self._on_news()
        return started

    def _stop(self, execution: Execution, cause: Outcome) -> None:
        execution.cause = cause
        self._forward(execution)  # an interrupt of what the worker has not got would be lost
        # Once more halfway: a signal can be lost as a blocking call begins, and the worker takes a second one as leave
        # to end even code that catches everything.
        execution.remind_at = self._clock() + limits.INTERRUPT_GRACE_S / 2
        execution.kill_at = self._clock() + limits.INTERRUPT_GRACE_S
        self.tool_calls.close(CallState.EXPIRED if cause is Outcome.TIMED_OUT else CallState.CANCELLED)
        self._interrupt()
        self._on_deadline()

    def _interrupt(self) -> None:
        self._interrupts_on_their_way += 1
        self._worker.interrupt()

    def _finish(self, report: _Report) -> None:
        execution, self._held_back = self._running, None
        if execution is None:
            return
        # Code that came to its end before the host's interrupt reached it has a result worth keeping.
        cause = execution.cause
        if cause is Outcome.INTERRUPTED and report.outcome in (Outcome.OK, Outcome.SUBMITTED):
            cause = None
        if cause is None:
            execution.told = execution.on_lane and report.told and report.keeps_pipe
            self._end(execution, report.outcome, report.error, report)
        else:
            # Its value does not count any more, but both sides must go on with the same pipe.
            self.files.let_go(report.blobs)
            stopped = dataclasses.replace(report, value=None, display=None, blobs=())
            self._end(execution, cause, explain(cause, execution, report.error), stopped)

    def _lose(self, reason: str) -> None:
        if self.lost is not None:
            return
        self.lost = reason
        if self._held_back is not None:
            self.files.let_go(self._held_back.blobs)
        self._channel_closed_at = self._held_back = None
        if self._running is not None:
            outcome = self._running.cause or Outcome.WORKER_DIED
            self._end(self._running, outcome, explain(outcome, self._running, None))
        self.tool_calls.close(CallState.CANCELLED)
        self._worker.kill()
        self._on_news()

    def _end(
        self, execution: Execution, outcome: Outcome, error: ErrorInfo | None, report: _Report | None = None
    ) -> None:
        execution.kept_pipe = report is not None and report.keeps_pipe
        printed = "" if report is None else report.printed
        if execution.told:  # and the host may have sent the next one, which may have printed already
            output = self._worker.leave_output(printed)
        else:
            output = self._worker.take_output(printed, keep=execution.kept_pipe)
        result = ExecutionResult(
            outcome=outcome,
            output=output.text,
            discarded_output_bytes=output.discarded_bytes,
            value=None if report is None else report.value,
            display=None if report is None else report.display,
            error=error,
            session_lost=self.lost,
            duration_s=round(self._clock() - execution.started_at, 6),
        )
        self.executions.ended(execution, result, () if report is None else report.blobs)
        self._let_go_of_left(execution)
        self._running = None
        self.tool_calls.close(CallState.CANCELLED)
        self.idleness.begin_anew()
        if self.idleness.ttl_s is not None:
            self._on_deadline()
        self._on_news()

    def _call_queued(self, call: ToolCall) -> None:
        self._watch_tools()
        self._on_news()

    def _call_ended(self, call: ToolCall) -> None:
        self._watch_tools()
        self._on_call_ended(call)

    def _watch_tools(self) -> None:
        """Let the clock stand still while the host works, where the execution asked for that."""
        running = self._running
        if running is None or running.timeout_includes_tools or running.timeout_s is None:
            return
        if len(self.tool_calls):
            running.stopwatch.pause()
        else:
            running.stopwatch.resume()
            self._on_deadline()


def _read_report(header: JsonObject, blobs: Blobs) -> _Report:
    result = ExecutionResult.reported(header)
    keeps_pipe, told = header.get("pipe") == "kept", header.get("lane") is True
    return _Report(result.outcome, result.value, result.display, result.error, blobs, result.output, keeps_pipe, told)
