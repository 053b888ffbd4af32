"""The queue of tool calls of one session: states, claims, leases. Never waits, knows no transport.

The drawing of the states is in ``docs/protocol.md``; ``_ALLOWED`` is the same as data.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from broker.errors import CallGone, LeaseExpired, TooManyCalls, UnknownCall
from broker.held_files import HeldFiles
from broker.protocol import limits
from broker.protocol.blob_file import BlobFile, Blobs
from broker.protocol.messages import CallState, ErrorInfo, ToolCallRequest, ToolResult, Verdict

Clock = Callable[[], float]

#: Ended calls that are remembered after the caller had the outcome: an answer posted twice, a reply lost on its way.
REMEMBERED_CALLS = 1024

#: Bytes of results kept for those.
REMEMBERED_BYTES = 64 << 20

_ALLOWED: dict[CallState, frozenset[CallState]] = {
    CallState.QUEUED: frozenset(
        # DONE and FAILED: a holder whose lease ended, and whom nobody replaced, may still answer.
        {CallState.LEASED, CallState.DONE, CallState.FAILED, CallState.CANCELLED, CallState.EXPIRED}
    ),
    CallState.LEASED: frozenset(
        {CallState.QUEUED, CallState.STARTED, CallState.DONE, CallState.FAILED, CallState.CANCELLED, CallState.EXPIRED}
    ),
    CallState.STARTED: frozenset(
        # QUEUED: only by the word of a new holder, see ``resolve``.
        {
            CallState.QUEUED,
            CallState.DONE,
            CallState.FAILED,
            CallState.UNKNOWN,
            CallState.CANCELLED,
            CallState.EXPIRED,
        }
    ),
    CallState.DONE: frozenset(),
    CallState.FAILED: frozenset(),
    CallState.CANCELLED: frozenset(),
    CallState.EXPIRED: frozenset(),
    CallState.UNKNOWN: frozenset(),
}
TERMINAL = frozenset(state for state, following in _ALLOWED.items() if not following)

_WITHOUT_ANSWER = {
    CallState.CANCELLED: ErrorInfo(type="ToolCallCancelled", message="the execution ended before the tool answered"),
    CallState.EXPIRED: ErrorInfo(
        type="ToolCallExpired", message="the execution's deadline passed before the tool answered"
    ),
    CallState.UNKNOWN: ErrorInfo(
        type="ToolOutcomeUnknown",
        message="the host was lost, or lost its record, while the tool ran; whether it finished is not known",
    ),
}


class IllegalTransition(RuntimeError):
    """A defect: a call was moved along no arrow of the drawing."""


@dataclasses.dataclass(slots=True, eq=False)
class ToolCall:
    """One request of generated code for a host function, and what became of it.

    Attributes:
        call_id: Given by the queue.
        request: What the caller asked for.
        blobs: Raw parts of the arguments; emptied once the call has ended.
        size: Bytes of the arguments.
        attempt: How often it was claimed.
        result_size: Bytes of the answer.
        lease_until: Clock time at which the claim is taken away, or None while nobody holds it.
        idempotent: Whether its tool was declared so.
        on_lane: Its caller has told the holder itself, and may have it offered again.
        orphaned: It was started, and its holder has fallen silent or was replaced; ``lease_until`` is when it is
            given up.
    """

    call_id: str
    request: ToolCallRequest
    blobs: Blobs
    size: int
    state: CallState = CallState.QUEUED
    attempt: int = 0
    result_size: int = 0
    lease_until: float | None = None
    value: Any = None
    error: ErrorInfo | None = None
    value_blobs: Blobs = ()
    idempotent: bool = False
    orphaned: bool = False
    on_lane: bool = False

    @property
    def key(self) -> str:
        """Idempotency key. Not the caller's own key: generated code could give two calls the same."""
        return self.call_id

    @property
    def ended(self) -> bool:
        """Whether it reached a terminal state."""
        return self.state in TERMINAL


class ToolCallQueue:
    """The tool calls of one session.

    Args:
        clock: Monotonic seconds.
        on_queued: Told of each call that became claimable.
        on_ended: Told of each call that reached a terminal state.
        max_open: Calls open at once.
        max_open_bytes: Bytes of arguments held for open calls.
        grace_s: How long a started call without a holder is kept for an answer or for a new holder, in seconds;
            None for ``limits.ATTACH_GRACE_S``.
        files: What the session holds in files; None for files of the queue's own.

    Attributes:
        stopped_at_file: Whether the last claim handed out fewer calls than it might have, for the sake of a file.
    """

    def __init__(
        self,
        *,
        clock: Clock = time.monotonic,
        on_queued: Callable[[ToolCall], None] = lambda call: None,
        on_ended: Callable[[ToolCall], None] = lambda call: None,
        max_open: int = limits.MAX_PENDING_TOOL_CALLS,
        max_open_bytes: int = limits.MAX_TOOL_CALL_BYTES,
        grace_s: float | None = None,
        files: HeldFiles | None = None,
    ) -> None:
        self._clock = clock
        self._files = HeldFiles() if files is None else files
        self.stopped_at_file = False
        self._on_queued, self._on_ended = on_queued, on_ended
        self._max_open, self._max_open_bytes = max_open, max_open_bytes
        self._grace_s = grace_s
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        # A call is in _open until it ends, then in _unread until its caller had the outcome, then in _read for a
        # while: exactly one of the three. It is in _queued as well while it is claimable.
        self._open: dict[str, ToolCall] = {}
        self._unread: dict[str, ToolCall] = {}
        self._read: OrderedDict[str, ToolCall] = OrderedDict()
        self._queued: OrderedDict[str, ToolCall] = OrderedDict()
        self._by_key: dict[tuple[str, str], str] = {}
        self._open_bytes = self._read_bytes = 0
        # The earliest lease end, or earlier: checked before the open calls are searched.
        self._next_lease_end: float | None = None

    def __len__(self) -> int:
        return len(self._open)

    @property
    def claimable(self) -> int:
        """How many calls wait for a claim."""
        return len(self._queued)

    @property
    def held(self) -> int:
        """How many calls somebody has claimed and not answered."""
        return len(self._open) - len(self._queued)

    def get(self, call_id: str) -> ToolCall:
        """Return a call, open or recently ended.

        Raises:
            UnknownCall: Never made, or forgotten since.
        """
        call = self.find(call_id)
        if call is None:
            raise UnknownCall(f"no tool call {call_id[:64]!r}")
        return call

    def find(self, call_id: str) -> ToolCall | None:
        """Return a call, open or recently ended, or None."""
        return self._open.get(call_id) or self._unread.get(call_id) or self._read.get(call_id)

    def submit(
        self, request: ToolCallRequest, blobs: Blobs = (), *, size: int = 0, idempotent: bool = False
    ) -> ToolCall:
        """Queue a call; the same ``key`` again gives the same call.

        Args:
            request: The call.
            blobs: Raw parts of its arguments.
            size: Bytes of the whole request.
            idempotent: Whether the tool was declared so.

        Raises:
            TooManyCalls: Too many calls, or bytes of arguments, are open.
        """
        known = self._by_key.get((request.execution_id, request.key))
        if known is not None:
            return self.get(known)
        call = self._admitted(f"{self._prefix}{next(self._numbers):x}", request, blobs, size, idempotent)
        self._queued[call.call_id] = call
        self._on_queued(call)
        return call

    def begun(
        self, call_id: str, request: ToolCallRequest, *, size: int, idempotent: bool, lease_s: float
    ) -> ToolCall | None:
        """Take in a call that its holder has from the caller itself, and runs: it counts as started at once.

        Returns:
            The call, or None where it is known.

        Raises:
            TooManyCalls: As for ``submit``.
        """
        if (request.execution_id, request.key) in self._by_key or self.find(call_id) is not None:
            return None
        call = self._admitted(call_id, request, (), size, idempotent)
        call.state, call.attempt, call.on_lane = CallState.STARTED, 1, True
        self._lease(call, lease_s)
        return call

    def offer_again(self, call: ToolCall) -> None:
        """Hand a started call out once more, as the attempt that it is: its holder may not have heard of it."""
        if call.on_lane and call.state is CallState.STARTED and call.call_id not in self._queued:
            self._queued[call.call_id] = call
            self._on_queued(call)

    def _admitted(self, call_id: str, request: ToolCallRequest, blobs: Blobs, size: int, idempotent: bool) -> ToolCall:
        if len(self._open) + len(self._unread) >= self._max_open:
            raise TooManyCalls(f"{self._max_open} tool calls are waiting already")
        if self._open and self._open_bytes + size > self._max_open_bytes:
            raise TooManyCalls(f"more than {self._max_open_bytes} bytes of tool arguments are waiting")
        if type(blobs) is BlobFile:
            blobs = self._files.keep(blobs)
        call = ToolCall(call_id, request, blobs, size, idempotent=idempotent)
        self._open[call.call_id] = call
        self._by_key[request.execution_id, request.key] = call.call_id
        self._open_bytes += size
        return call

    def claim(self, *, limit: int, lease_s: float, start: bool = False) -> list[ToolCall]:
        """Hand out queued calls, oldest first. One whose arguments are in a file comes alone: a frame has one file.

        Args:
            limit: At most so many.
            lease_s: Seconds until a claim that is not renewed is taken away.
            start: Count them as started at once.
        """
        self.expire_leases()
        claimed: list[ToolCall] = []
        self.stopped_at_file = False
        while self._queued and not self.stopped_at_file and len(claimed) < limit:
            call = next(iter(self._queued.values()))
            if type(call.blobs) is BlobFile:
                self.stopped_at_file = True
                if claimed:
                    break
            if call.state is CallState.STARTED:  # offered again
                del self._queued[call.call_id]
                self._lease(call, lease_s)
            else:
                self._move(call, CallState.LEASED)
                call.attempt += 1
                self._lease(call, lease_s)
                if start:
                    self._move(call, CallState.STARTED)
            claimed.append(call)
        return claimed

    def start(self, call_id: str, attempt: int) -> ToolCall:
        """Note that the holder is about to run the tool. The same attempt again changes nothing.

        Raises:
            UnknownCall, LeaseExpired, CallGone: As for ``finish``; the tool must not be run.
        """
        call = self._held(call_id, attempt)
        if call.state is CallState.QUEUED:
            raise LeaseExpired(f"the lease of {call_id} ended; claim it again")
        if call.state is CallState.LEASED:
            self._move(call, CallState.STARTED)
        return call

    def renew(self, held: Iterable[tuple[str, int]], lease_s: float) -> list[str]:
        """Prolong leases; return the ids that are not the caller's any more."""
        lost = []
        for call_id, attempt in held:
            call = self._open.get(call_id)
            if call is None or call.attempt != attempt or call.lease_until is None:
                lost.append(call_id)
            else:
                self._lease(call, lease_s)
        return lost

    def take_over(self) -> list[ToolCall]:
        """A new client holds the session: hand out anew what never started, and return what did.

        The started ones wait for ``finish`` or ``resolve``, and are given up after the grace.
        """
        self.expire_leases()
        held = [call for call in self._open.values() if call.state is not CallState.QUEUED]
        for call in reversed(held):  # each goes to the head of the queue, the oldest last
            if call.state is CallState.LEASED:
                self._move(call, CallState.QUEUED)
        started = [call for call in held if call.state is CallState.STARTED]
        for call in started:
            self._orphan(call)
        return started

    def resolve(self, call_id: str, attempt: int, verdict: Verdict) -> ToolCall:
        """Take a new holder's word for a call that its predecessor had started. The same word again changes nothing.

        Raises:
            UnknownCall, LeaseExpired, CallGone: As for ``finish``.
        """
        call = self.get(call_id)
        if call.state.value == verdict.value and call.attempt == attempt:
            return call
        call = self._held(call_id, attempt)
        if call.state is not CallState.STARTED:
            raise LeaseExpired(f"the call {call_id} is {call.state.value}, there is nothing to resolve")
        self._move(call, CallState(verdict.value))
        return call

    def finish(self, call_id: str, answer: ToolResult, blobs: Blobs = (), *, size: int = 0) -> ToolCall:
        """Store the holder's answer. The same attempt again gets the stored outcome and changes nothing.

        Args:
            call_id: The call.
            answer: Value or error, and the attempt that it belongs to.
            blobs: Raw parts of the value.
            size: Bytes of the whole answer.

        Raises:
            UnknownCall: No such call.
            LeaseExpired: Another attempt holds the call, or has answered it.
            CallGone: The call ended without an answer.
        """
        call = self._held(call_id, answer.attempt)
        if call.ended:
            return call
        if answer.error is None:
            if type(blobs) is BlobFile:
                blobs = self._files.keep(blobs)
            call.value, call.value_blobs = answer.value, blobs
        else:
            call.error = answer.error
        call.result_size = size
        self._move(call, CallState.DONE if answer.error is None else CallState.FAILED)
        return call

    def note_read(self, call: ToolCall) -> None:
        """Note that the caller had the outcome: from now on the call may be forgotten."""
        if self._unread.pop(call.call_id, None) is None:
            return
        self._read[call.call_id] = call
        self._read_bytes += call.result_size
        while len(self._read) > REMEMBERED_CALLS or (len(self._read) > 1 and self._read_bytes > REMEMBERED_BYTES):
            _, forgotten = self._read.popitem(last=False)
            self._read_bytes -= forgotten.result_size
            self._by_key.pop((forgotten.request.execution_id, forgotten.request.key), None)
            if forgotten.value_blobs:
                self._files.let_go(forgotten.value_blobs)

    def close(self, state: CallState) -> None:
        """End every open call as cancelled or expired: its execution is over, and nobody reads outcomes any more."""
        for call in list(self._open.values()):
            self._move(call, state)
        for call in list(self._unread.values()):
            self.note_read(call)
        self._next_lease_end = None

    def expire_leases(self) -> None:
        """Take away what was not renewed: back to the queue if it never started.

        What did start is kept for the grace: its holder may still answer or go on, or a new one say how it ended.
        After that its outcome is unknown.
        """
        if self._next_lease_end is None or self._clock() < self._next_lease_end:
            return
        now = self._clock()
        for call in [c for c in self._open.values() if c.lease_until is not None and c.lease_until <= now]:
            if call.state is CallState.LEASED:
                self._move(call, CallState.QUEUED)
            elif call.orphaned:
                self._move(call, CallState.UNKNOWN)
            else:
                self._orphan(call)
        self._next_lease_end = min(self._lease_ends(), default=None)

    def next_lease_end(self) -> float | None:
        """Return the clock time at which ``expire_leases`` has something to look at, or None."""
        return self._next_lease_end

    def _lease_ends(self) -> Iterator[float]:
        return (call.lease_until for call in self._open.values() if call.lease_until is not None)

    def _lease(self, call: ToolCall, lease_s: float) -> None:
        call.orphaned = False
        call.lease_until = self._clock() + lease_s
        if self._next_lease_end is None or call.lease_until < self._next_lease_end:
            self._next_lease_end = call.lease_until

    def _orphan(self, call: ToolCall) -> None:
        self._queued.pop(call.call_id, None)  # nobody is to run it who does not know of it
        self._lease(call, limits.ATTACH_GRACE_S if self._grace_s is None else self._grace_s)
        call.orphaned = True
        call.on_lane = False  # a new holder knows of it, and decides

    def _held(self, call_id: str, attempt: int) -> ToolCall:
        self.expire_leases()
        call = self.get(call_id)
        if call.state in _WITHOUT_ANSWER:
            raise CallGone(f"the call {call_id} is {call.state.value}")
        if call.attempt != attempt:
            raise LeaseExpired(f"attempt {attempt} of the call {call_id} was replaced by attempt {call.attempt}")
        return call

    def _move(self, call: ToolCall, to: CallState) -> None:
        if to not in _ALLOWED[call.state]:
            raise IllegalTransition(f"{call.call_id}: {call.state.value} -> {to.value}")
        call.state = to
        if to is CallState.QUEUED:
            call.lease_until, call.orphaned = None, False
            self._queued[call.call_id] = call
            self._queued.move_to_end(call.call_id, last=False)  # it has waited longest
            self._on_queued(call)
            return
        self._queued.pop(call.call_id, None)
        if to in TERMINAL:
            self._retire(call)

    def _retire(self, call: ToolCall) -> None:
        call.lease_until = None
        if call.blobs:
            self._files.let_go(call.blobs)
            call.blobs = ()
        call.error = call.error or _WITHOUT_ANSWER.get(call.state)
        del self._open[call.call_id]
        self._open_bytes -= call.size
        self._unread[call.call_id] = call
        self._on_ended(call)
