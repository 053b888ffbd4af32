"""Runs the host's tools for generated code: claims, threads, contexts, answers."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from broker.protocol import limits
from broker.protocol.frames import Blob
from broker.protocol.messages import Claim, ClaimRequest, ErrorInfo, ToolResult, Verdict
from broker.protocol.values import DecodeError, Decoder, Encoder, ValueNotSendable
from host_client.broker_client import BrokerClient, News
from host_client.call_recorder import CallRecorder, RunningRecord
from host_client.errors import (
    BrokerUnreachable,
    CallGone,
    Fenced,
    JournalNewer,
    JournalUnusable,
    LeaseExpired,
    SandboxError,
)
from host_client.masking import NOTHING_TO_MASK, Masker
from host_client.mending import MOST_TRIES, Mender, is_broken
from host_client.tool_marks import CurrentCall, serving
from host_client.tool_threads import ToolThreads

log = logging.getLogger(__name__)

#: A long poll renews the leases, so it must return well before they end.
POLL_S = min(limits.DEFAULT_LEASE_S / 3, limits.MAX_WAIT_S)
#: A tool's error message is for a model to read.
_MAX_MESSAGE_CHARS = 100_000

#: What comes twice does so while its call is open, and so many can be open at once.
_REMEMBERED_CLAIMS = 2 * limits.MAX_PENDING_TOOL_CALLS

Invoke = Callable[[str, list[Any], dict[str, Any]], Any]
#: A claim with its blobs.
_Held = tuple[Claim, Sequence[Blob]]


class ToolCalls:
    """The tool calls of one execution.

    Each is recorded before its tool starts and before its outcome is told (``call_recorder``).

    Tools run on threads; the thread that waits for the execution claims the calls and starts them. A broker that
    streams claims counts the slots itself. From another one it can claim nothing while all slots are taken, so the
    first tool thread to get free waits for further claims in its stead.

    Args:
        client: Where answers go.
        session_id: The session.
        execution_id: The execution.
        invoke: Runs one tool by name, and gives its result or an awaitable.
        threads: Where tools run.
        slots: How many run at the same time.
        recorder: Notes what starts and how it ends.
        is_idempotent: Tells of a tool by name whether it may run twice for one call.
        masker: Takes secrets out of what is logged; tools get what the code has passed.
        mender: Mends the way to the broker, where that can break without it.
    """

    def __init__(
        self,
        *,
        client: BrokerClient,
        session_id: str,
        execution_id: str,
        invoke: Invoke,
        threads: ToolThreads,
        slots: int,
        recorder: CallRecorder,
        is_idempotent: Callable[[str], bool] = lambda name: False,
        masker: Masker = NOTHING_TO_MASK,
        mender: Mender | None = None,
    ) -> None:
        self._masker = masker
        self._passing: Callable[[], AbstractContextManager[None]] = nullcontext if mender is None else mender.passing
        self._tries = 1 if mender is None else MOST_TRIES
        self._recorder, self._is_idempotent = recorder, is_idempotent
        self._client, self._session_id, self._execution_id = client, session_id, execution_id
        self._invoke, self._threads, self._slots = invoke, threads, slots
        # Every tool sees the caller's context variables (dspy.context), each in a copy of its own.
        self._context = contextvars.copy_context()
        # Guards the eight below: a claim is in _held from the moment it is taken until its tool has ended.
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}
        # Of a call that went by the lane the broker may tell us once more.
        self._taken: dict[tuple[str, int], None] = {}
        # Calls that went by the lane come without being asked for: those that no slot is free for wait here.
        self._running = 0
        self._backlog: deque[_Held] = deque()
        self._claiming_elsewhere = False
        self._streamed = False
        self._ended = False
        self._fatal: BaseException | None = None

    @property
    def fatal(self) -> BaseException | None:
        """A tool's KeyboardInterrupt, SystemExit or cancellation: for whoever called ``execute``."""
        return self._fatal

    @property
    def busy(self) -> bool:
        """Whether any tool runs."""
        return bool(self._held)

    def held(self) -> list[str]:
        """Return the ids of the calls that are ours to answer."""
        with self._lock:
            return list(self._held)

    def wanted(self, *, wait_s: float) -> ClaimRequest:
        """Return the next claim request of the thread that waits for the execution."""
        with self._lock:
            limit = 0 if self._claiming_elsewhere else self._slots - (0 if self._streamed else len(self._held))
            return self._request(max(0, limit), wait_s)

    def take(self, news: News) -> None:
        """Start the claimed tools."""
        if news.progress.more:
            self._streamed = True
        if news.progress.lost:
            log.debug("no longer ours to answer: %s", news.progress.lost)
        for claim, blobs in self._hold(news):
            with self._lock:
                waits = self._running >= self._slots
                if waits:
                    self._backlog.append((claim, blobs))
                else:
                    self._running += 1
            if not waits:
                self._threads.run(partial(self._run, claim, blobs))

    def _hold(self, news: News) -> list[_Held]:
        """Note that these calls are ours; return each with its blobs, but none that we had before."""
        with self._lock:
            claims = [each for each in news.progress.claims if (each.call_id, each.attempt) not in self._taken]
            held = [(claim.call_id, claim.attempt) for claim in claims]
            self._taken.update(dict.fromkeys(held))
            while len(self._taken) > _REMEMBERED_CLAIMS:
                del self._taken[next(iter(self._taken))]
            self._held.update(held)
        return [(claim, news.blobs[slice(*claim.blob_range)]) for claim in claims]

    def end(self) -> None:
        """The execution is over: answers of tools that still run go nowhere."""
        self._ended = True

    def _request(self, limit: int, wait_s: float) -> ClaimRequest:
        return ClaimRequest(
            limit=limit, wait_s=wait_s, renew=tuple(self._held.items()), execution_id=self._execution_id
        )

    def _run(self, claim: Claim, blobs: Sequence[Blob]) -> None:
        """Serve a call, and as long as others wait, the next one that comes with the reply to each answer."""
        must_claim = False
        following: _Held | None = (claim, blobs)
        try:
            while following is not None:
                (claim, blobs), claimed = following, None
                try:
                    claimed = self._serve(claim, blobs)
                finally:
                    must_claim = self._release(claim)
                following = self._following(claimed)
        except BaseException:
            with self._lock:
                self._running -= 1
            raise
        if must_claim:
            self._claim_in_its_stead()

    def _following(self, claimed: _Held | None) -> _Held | None:
        """Return the next call for the same thread; where there is none, its slot is free."""
        with self._lock:
            if claimed is not None and not self._ended:
                return claimed
            if self._backlog and not self._ended and self._fatal is None:
                return self._backlog.popleft()
            self._running -= 1
            return None

    def _serve(self, claim: Claim, blobs: Sequence[Blob]) -> _Held | None:
        """Record, run, record, answer: in this order, and no step where the one before failed.

        Returns:
            The next call to serve, where the broker had one.
        """
        try:
            with self._passing():
                record = self._recorder.begin(claim, idempotent=self._is_idempotent(claim.tool))
        except (JournalUnusable, JournalNewer) as error:
            self._not_run(claim, error)
            return None
        except (Fenced, CallGone) as error:
            log.warning("tool %s (call %s) was not run: %s", claim.tool, claim.call_id, error)
            return None
        result, result_blobs = self._context.copy().run(self._call, claim, blobs)
        try:
            record.conclude(result, result_blobs)
        except (JournalUnusable, JournalNewer) as error:
            self._not_recorded(claim, error)
            return None
        return self._answer(claim, result, result_blobs, record)

    def _not_run(self, claim: Claim, error: SandboxError) -> None:
        """What cannot be recorded must not happen; the caller of ``execute`` gets the error, the code a hint of it."""
        log.error("tool %s (call %s) was not run: %s", claim.tool, claim.call_id, error)
        self._mark_fatal(error)  # first: the answer may end the execution before this thread goes on
        hint = f"{claim.tool}() was not run: the host cannot record the call"
        self._answer(claim, _failed(claim, ErrorInfo(type="RuntimeError", message=hint)), ())
        self._interrupt()

    def _not_recorded(self, claim: Claim, error: SandboxError) -> None:
        """The tool ran, and a successor could not know how it ended: so nobody is told that it did."""
        log.error("the outcome of tool %s (call %s) was not recorded: %s", claim.tool, claim.call_id, error)
        self._mark_fatal(error)
        try:
            self._client.resolve(claim.call_id, claim.attempt, Verdict.UNKNOWN)
        except SandboxError as refused:
            log.debug("resolving %s: %s", claim.call_id, refused)
        self._interrupt()

    def _call(self, claim: Claim, blobs: Sequence[Blob]) -> tuple[ToolResult, Sequence[Blob]]:
        try:
            decoder = Decoder(blobs)
            args = [decoder.decode(value) for value in claim.args]
            kwargs = {name: decoder.decode(value) for name, value in claim.kwargs.items()}
            with serving(_current(claim)):
                value = self._invoke(claim.tool, args, kwargs)
            encoder = Encoder()
            encoded = encoder.encode(value, f"{claim.tool}()")
            if (size := sum(map(len, encoder.blobs))) > limits.MAX_TOOL_CALL_BYTES:
                raise ValueNotSendable(f"{claim.tool}(): a result of {size:,} bytes is too large")
        except ValueNotSendable as error:
            log.warning("the result of tool %s (call %s) cannot be sent: %s", claim.tool, claim.call_id, error)
            return _failed(claim, ErrorInfo(type="TypeError", message=f"result of tool {error}")), ()
        except DecodeError as error:
            return _failed(claim, ErrorInfo(type="ValueError", message=f"arguments of {claim.tool}: {error}")), ()
        except Exception as error:
            if self._masker:
                trace = self._masker.text(traceback.format_exc())
                log.error("tool %s failed (call %s)\n%s", claim.tool, claim.call_id, trace)
            else:
                log.exception("tool %s failed (call %s)", claim.tool, claim.call_id)
            return _failed(claim, public_error(error)), ()
        except BaseException as error:
            self._mark_fatal(error)
            self._interrupt()
            return _failed(claim, public_error(error)), ()
        return ToolResult(attempt=claim.attempt, value=encoded), encoder.blobs

    def _mark_fatal(self, error: BaseException) -> None:
        """The caller of ``execute`` gets this exception, however the execution ends."""
        with self._lock:
            self._fatal = self._fatal or error

    def _interrupt(self) -> None:
        try:
            self._client.interrupt(self._session_id, self._execution_id)
        except SandboxError as refused:
            log.debug("interrupt: %s", refused)

    def _answer(
        self, claim: Claim, result: ToolResult, blobs: Sequence[Blob], record: RunningRecord | None = None
    ) -> _Held | None:
        if self._ended:
            return None
        try:
            claimed = self._answered(claim, result, blobs)
            if record is not None:
                record.delivered()
            return claimed
        except (CallGone, LeaseExpired, Fenced) as late:
            log.debug("the answer of %s came too late: %s", claim.tool, late)
        except BrokerUnreachable as gone:
            log.debug("the answer of %s found no broker: %s", claim.tool, gone)  # the waiting thread reports it
        except SandboxError as refused:
            if self._ended or result.error is not None:
                log.debug("the answer of %s was refused: %s", claim.tool, refused)
                return None
            log.warning("the answer of tool %s (call %s) was refused: %s", claim.tool, claim.call_id, refused)
            error = ErrorInfo(type="RuntimeError", message=f"the result of {claim.tool}() was refused: {refused}")
            self._refuse(claim, error, record)
        return None

    def _answered(self, claim: Claim, result: ToolResult, blobs: Sequence[Blob]) -> _Held | None:
        """Answer a call; return the next one, which is ours before anybody mends the way."""
        for left in reversed(range(self._tries)):
            try:
                with self._passing():
                    news = self._client.answer(
                        claim.call_id, result, blobs, claim=self._streamed and self._fatal is None
                    )
                    return None if news is None else next(iter(self._hold(news)), None)
            except BrokerUnreachable as gone:
                if not left or not is_broken(gone) or self._ended:
                    raise
        return None

    def _refuse(self, claim: Claim, error: ErrorInfo, record: RunningRecord | None) -> None:
        """Answer with an error in the place of a result that the broker does not take."""
        failed = _failed(claim, error)
        if record is not None:
            try:
                record.conclude(failed, ())
            except (JournalUnusable, JournalNewer) as unrecorded:
                self._not_recorded(claim, unrecorded)
                return
        self._answer(claim, failed, (), record)

    def _release(self, claim: Claim) -> bool:
        """Give the slot back; tell whether this thread must claim, because the waiting one asked for nothing."""
        with self._lock:
            was_full = len(self._held) >= self._slots
            del self._held[claim.call_id]
            if self._ended or self._streamed or not was_full or self._claiming_elsewhere:
                return False
            self._claiming_elsewhere = True
            return True

    def _claim_in_its_stead(self) -> None:
        while True:
            with self._lock:
                limit = self._slots - len(self._held)
                if limit <= 0 or self._ended:
                    self._claiming_elsewhere = False
                    return
                request = self._request(limit, POLL_S)
            try:
                news = self._client.claim(self._session_id, request)
            except SandboxError as error:
                log.debug("claiming ended: %s", error)  # the waiting thread gets the same answer, and reports it
                news = None
            if news is None or not news.progress.running:
                with self._lock:
                    self._claiming_elsewhere = False
                return
            self.take(news)


def await_result(result: Any) -> Any:
    """Wait for an awaitable on this thread, which has no event loop; other results are returned as they are."""
    if not inspect.isawaitable(result):
        return result
    return asyncio.run(_await(result))


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def public_error(error: BaseException) -> ErrorInfo:
    """Return what generated code may know of a tool's error: its name and its text, no traceback."""
    try:
        message = str(error)
    except Exception:  # a __str__ of the tool's making
        message = ""
    return ErrorInfo(type=type(error).__name__[:200], message=message[:_MAX_MESSAGE_CHARS])


def _current(claim: Claim) -> CurrentCall:
    return CurrentCall(
        call_id=claim.call_id,
        key=claim.key or claim.call_id,
        attempt=claim.attempt,
        execution_id=claim.execution_id,
        tool=claim.tool,
    )


def _failed(claim: Claim, error: ErrorInfo) -> ToolResult:
    return ToolResult(attempt=claim.attempt, error=error)
