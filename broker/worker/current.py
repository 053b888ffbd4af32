"""Which execution runs now, and which threads belong to it."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any

from broker.protocol.frames import Blob

if TYPE_CHECKING:
    from broker.worker.unwinding import Unwinding


@dataclasses.dataclass(frozen=True, slots=True)
class Submission:
    """What SUBMIT was given, encoded."""

    value: dict[str, Any]
    blobs: list[Blob]


@dataclasses.dataclass(slots=True, eq=False)
class Execution:
    """One execution, from its frame's arrival until its result leaves.

    Attributes:
        execution_id: Chosen by the host.
        interrupts: How many SIGINTs came.
        submission: Set by the first SUBMIT; nothing replaces it.
        unwinding: Set while generated code is made to leave.
    """

    execution_id: str
    interrupts: int = 0
    submission: Submission | None = None
    unwinding: Unwinding | None = None


class _Tag(threading.local):
    """The execution that this thread belongs to; None in the main thread, which belongs to whichever runs."""

    execution: Execution | None = None


class Current:
    """The running execution, as wrappers, SUBMIT, streams and the signal handler see it.

    Attributes:
        execution: The running one, or None between executions. A forked child keeps the one of its fork.
        in_child: Whether this process was forked off the worker by generated code.
        tag: Of the calling thread.
    """

    def __init__(self) -> None:
        self.execution: Execution | None = None
        self.in_child = False
        self.tag = _Tag()

    def is_stale(self) -> bool:
        """Tell whether the calling thread was started by an execution that has ended."""
        own = self.tag.execution
        return own is not None and own is not self.execution

    def owner(self) -> Execution | None:
        """Return the execution that the calling thread works for."""
        return self.tag.execution or self.execution

    def require(self, what: str) -> Execution:
        """Return the running execution, to which the calling thread belongs.

        Raises:
            RuntimeError: The thread belongs to an execution that has ended, or none runs.
        """
        execution = self.execution
        if execution is None or self.is_stale():
            raise RuntimeError(
                f"{what} was called by a thread that belongs to an execution that has ended; "
                "start threads inside the execution that uses them"
            )
        return execution
