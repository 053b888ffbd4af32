"""One session's view of the journal: what is written at which step of a tool call."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from broker.protocol.frames import Blob, dump_frame, load_frame
from broker.protocol.messages import Claim, ToolResult
from host_client.errors import CallGone
from host_client.journal import DONE, FAILED, MAX_OUTCOME_BYTES, CallRecord, Holder, Journal
from host_client.masking import NOTHING_TO_MASK, Masker

#: A claim that arrives twice does so soon; 20,000 starts take 3 MB.
_REMEMBERED_STARTS = 20_000


class CallRecorder:
    """Records the calls of one client's turn at a session.

    Args:
        journal: Where to.
        holder: Whose turn it is.
        masker: Knows the session's secrets; an outcome that holds one is not written down.
        clock: Wall-clock seconds, for people.
        stopwatch: Monotonic seconds.
    """

    def __init__(
        self,
        journal: Journal,
        holder: Holder,
        masker: Masker = NOTHING_TO_MASK,
        *,
        clock: Callable[[], float] = time.time,
        stopwatch: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal, self._holder, self._masker = journal, holder, masker
        self._clock, self._stopwatch = clock, stopwatch
        self._closed = False
        # What this turn has started, newest last: the journal may forget it (the clock was set), this process does not.
        self._begun: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the journal, now and after each tool that goes on although its session has ended. Idempotent."""
        self._closed = True
        self._journal.close()

    def goes_on_as(self, holder: Holder) -> None:
        """Record under another epoch from now on: the session was taken over from ourselves."""
        self._holder = holder

    def begin(self, claim: Claim, *, idempotent: bool) -> RunningRecord:
        """Note that a tool starts; of an idempotent one only when it has ended.

        Raises:
            JournalUnusable, Fenced, CallGone: The tool must not start.
        """
        record = CallRecord(
            sandbox_id=self._holder.sandbox_id,
            call_id=claim.call_id,
            attempt=claim.attempt,
            session_id=self._holder.session_id,
            sandbox=self._holder.sandbox,
            execution_id=claim.execution_id,
            tool=claim.tool,
            started_at=self._clock(),
        )
        if not idempotent:
            self._check_new((claim.call_id, claim.attempt))
            self._journal.intend(self._holder, record)
        return RunningRecord(self, record)

    def conclude(self, record: CallRecord, result: ToolResult, blobs: Sequence[Blob]) -> None:
        """Note how a tool ended; see ``RunningRecord.conclude``."""
        # Masked it would be another result: a successor that needs it resolves the call as unknown instead.
        record.outcome = None if self._masker.is_in(result, blobs) else pack(result, blobs)
        try:
            self._journal.conclude(record)
        finally:
            if self._closed:
                self._journal.close()

    def delivered(self, record: CallRecord) -> None:
        """Note that the broker has an outcome."""
        self._journal.delivered(record.key)

    def _check_new(self, attempt: tuple[str, int]) -> None:
        with self._lock:
            if attempt in self._begun:
                raise CallGone(f"attempt {attempt[1]} at the call {attempt[0]} was started before", status=410)
            self._begun[attempt] = None
            if len(self._begun) > _REMEMBERED_STARTS:
                self._begun.popitem(last=False)

    def now_s(self) -> float:
        """Return monotonic seconds."""
        return self._stopwatch()


class RunningRecord:
    """The record of a tool that runs."""

    def __init__(self, recorder: CallRecorder, record: CallRecord) -> None:
        self._recorder, self._record = recorder, record
        self._started_at = recorder.now_s()

    def conclude(self, result: ToolResult, blobs: Sequence[Blob]) -> None:
        """Record the outcome before the broker is told.

        Raises:
            JournalUnusable: It could not be; the outcome must not be told.
        """
        self._record.state = DONE if result.error is None else FAILED
        self._record.duration_s = self._recorder.now_s() - self._started_at
        self._recorder.conclude(self._record, result, blobs)

    def delivered(self) -> None:
        """Note that the broker has it."""
        self._recorder.delivered(self._record)


def pack(result: ToolResult, blobs: Sequence[Blob]) -> bytes | None:
    """Return an outcome as the journal keeps it, or None where it is too large."""
    if sum(map(len, blobs)) > MAX_OUTCOME_BYTES:
        return None
    return b"".join(dump_frame(result.to_json(), blobs))


def unpack(outcome: bytes) -> tuple[ToolResult, Sequence[Any]]:
    """Return what ``pack`` packed."""
    header, blobs = load_frame(outcome)
    return ToolResult.from_json(header), blobs
