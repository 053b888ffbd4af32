"""Executions of one session: the one that runs, and the stored replies of those that ended."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from broker.held_files import HeldFiles
from broker.protocol import limits
from broker.protocol.blob_file import BlobFile, Blobs
from broker.protocol.messages import ErrorInfo, ExecuteRequest, ExecutionResult, Outcome
from broker.stopwatch import Stopwatch

#: Bytes of stored replies in one session; the newest is kept whatever its size.
STORED_REPLY_BYTES = 64 << 20


@dataclasses.dataclass(slots=True, eq=False)
class Execution:
    """One execution, running or ended.

    Attributes:
        execution_id: Chosen by the host.
        timeout_s: Deadline in seconds, or None.
        timeout_includes_tools: Whether the clock runs while the host works.
        started_at: Clock time.
        stopwatch: Runs out at the deadline.
        cause: Why it was told to stop (timed out, interrupted, output limit), or None.
        remind_at: Clock time at which it is interrupted once more.
        kill_at: Clock time at which the session is killed unless the execution has ended.
        result: Set at its end, together with ``blobs``.
        blobs: Raw parts of the result's value.
        size: Bytes held for its reply, roughly; counted at its end.
        announced: Whether the host may have sent it on the lane, and takes tool calls there.
        on_lane: Whether it was left to the lane.
        left: The worker's frame of such a one, until it is sent after all or the execution ends.
        forward_at: Clock time at which it is sent after all.
        prints: Whether the worker has said that it prints much; once for each execution.
        told: Whether the worker itself has told the host the result, on the lane.
        kept_pipe: Whether the next one may come on the lane: its pipe is there already.
    """

    execution_id: str
    timeout_s: float | None
    timeout_includes_tools: bool
    started_at: float
    stopwatch: Stopwatch
    cause: Outcome | None = None
    remind_at: float | None = None
    kill_at: float | None = None
    result: ExecutionResult | None = None
    blobs: Blobs = ()
    size: int = 0
    announced: bool = False
    on_lane: bool = False
    left: tuple[dict[str, Any], Blobs] | None = None
    forward_at: float | None = None
    prints: bool = False
    told: bool = False
    kept_pipe: bool = False

    @property
    def running(self) -> bool:
        """Whether it has no result yet."""
        return self.result is None

    @property
    def accepts_calls(self) -> bool:
        """Whether its code may still call tools."""
        return self.result is None and self.cause is None

    @classmethod
    def of(cls, request: ExecuteRequest, started_at: float, stopwatch: Stopwatch) -> Execution:
        """Return the record of a request that starts now."""
        return cls(
            execution_id=request.execution_id,
            timeout_s=request.timeout_s,
            timeout_includes_tools=request.timeout_includes_tools,
            started_at=started_at,
            stopwatch=stopwatch,
        )


class ExecutionStore:
    """The executions of one session by id, oldest first; bounded in number and in bytes.

    Args:
        files: What the session holds in files.
    """

    def __init__(self, files: HeldFiles) -> None:
        self._files = files
        self._all: OrderedDict[str, Execution] = OrderedDict()
        self._held_bytes = 0

    def __iter__(self) -> Iterator[Execution]:
        return iter(self._all.values())

    def get(self, execution_id: str) -> Execution | None:
        """Return an execution that is still stored."""
        return self._all.get(execution_id)

    def latest(self) -> Execution | None:
        """Return the newest one."""
        return next(reversed(self._all.values()), None)

    def add(self, execution: Execution) -> None:
        """Store a new one."""
        self._all[execution.execution_id] = execution
        self._forget_oldest()

    def ended(self, execution: Execution, result: ExecutionResult, blobs: Blobs) -> None:
        """Store the result of one."""
        execution.result, execution.blobs = result, blobs
        execution.size = len(result.output) + (blobs.size if type(blobs) is BlobFile else sum(map(len, blobs)))
        self._held_bytes += execution.size
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        while len(self._all) > limits.STORED_EXECUTIONS or (
            len(self._all) > 1 and self._held_bytes > STORED_REPLY_BYTES
        ):
            _, forgotten = self._all.popitem(last=False)
            self._held_bytes -= forgotten.size
            if forgotten.blobs:
                self._files.let_go(forgotten.blobs)


def explain(cause: Outcome, execution: Execution, found: ErrorInfo | None) -> ErrorInfo:
    """Return the error of an execution that the broker stopped, with the place where it was stopped if known."""
    texts = {
        Outcome.TIMED_OUT: (
            "ExecutionTimedOut",
            f"the execution exceeded its {execution.timeout_s:g} s" if execution.timeout_s else "",
        ),
        Outcome.INTERRUPTED: ("ExecutionInterrupted", "the execution was interrupted by the host"),
        Outcome.OUTPUT_LIMIT: ("OutputLimitExceeded", "the execution printed far more than can be kept"),
        Outcome.WORKER_DIED: ("WorkerDied", "the process that ran the code ended"),
    }
    name, message = texts[cause]
    if found is None:
        return ErrorInfo(type=name, message=message)
    return ErrorInfo(type=name, message=message, traceback=found.traceback, lineno=found.lineno)
