"""One execution from post to result: waits, hands tool calls over, guards the deadline, interrupts on Ctrl-C."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from broker.protocol import limits
from broker.protocol.frames import Blob
from broker.protocol.messages import ClaimRequest, ExecuteRequest
from host_client.broker_client import LATE_S, BrokerClient, News
from host_client.errors import BrokerUnreachable, MalformedReply, SandboxError, SessionLost
from host_client.mending import MOST_MENDS, Mender, is_broken
from host_client.tool_runner import POLL_S, ToolCalls

log = logging.getLogger(__name__)

#: How much longer than the broker's own last resort the host waits before it stops believing in the broker.
HOST_GUARD_S = 5.0
#: The broker's clock and ours differ by what a request takes.
_GUARD_LATE_S = 0.5


class Execution:
    """Runs one request.

    Args:
        client: The broker.
        session_id: The session.
        calls: Where tool calls go.
        mender: Mends the way to the broker, where that can break without it.
    """

    def __init__(self, client: BrokerClient, session_id: str, calls: ToolCalls, mender: Mender | None = None) -> None:
        self._client, self._session_id, self._calls, self._mender = client, session_id, calls, mender

    def run(self, request: ExecuteRequest, blobs: Sequence[Blob | str]) -> News:
        """Post the request and return its result.

        Whatever is raised in this thread meanwhile (Ctrl-C, a cancellation) stops the execution in the sandbox first,
        so that the session can be used again.

        Raises:
            SandboxError: What the broker client raises.
            SessionLost: The broker let the deadline pass.
        """
        guard = _Guard(request)
        wait_s, late_s = guard.patience(busy=False)

        def post() -> News:
            wanted = self._calls.wanted(wait_s=wait_s)
            take = self._taking(guard)
            return self._client.execute(self._session_id, request, blobs, wanted, late_s=late_s, on_claims=take)

        return self._guarded(request.execution_id, guard, post)

    def resume(self, execution_id: str) -> News:
        """Carry an execution to its end that another client has posted; return its stored reply if it has ended.

        Raises:
            SandboxError: What the broker client raises.
        """
        guard = _Guard(None)

        def ask() -> News:
            wanted = self._calls.wanted(wait_s=POLL_S)
            return self._client.claim(self._session_id, wanted, on_claims=self._taking(guard))

        return self._guarded(execution_id, guard, ask)

    def _guarded(self, execution_id: str, guard: _Guard, begin: Callable[[], News]) -> News:
        try:
            return self._carried(execution_id, guard, begin)
        except SandboxError:
            raise
        except BaseException:
            self._interrupt(execution_id)
            raise
        finally:
            self._calls.end()

    def _carried(self, execution_id: str, guard: _Guard, begin: Callable[[], News]) -> News:
        """Follow the execution to its end, over as many ways to the broker as that takes."""
        mends = 0
        while True:
            try:
                return self._follow(execution_id, guard, begin())
            except BrokerUnreachable as error:
                mends += 1
                if self._mender is None or not is_broken(error) or mends > MOST_MENDS:
                    raise
                log.debug("following %s: %s", execution_id, error)
            if self._mender.mend(self._calls.held).execution_id == execution_id:
                begin = partial(self._ask, guard)  # else it has never arrived

    def _ask(self, guard: _Guard) -> News:
        wait_s, late_s = guard.patience(busy=self._calls.busy)
        wanted = self._calls.wanted(wait_s=wait_s)
        return self._client.claim(self._session_id, wanted, late_s=late_s, on_claims=self._taking(guard))

    def _follow(self, execution_id: str, guard: _Guard, news: News) -> News:
        while news.progress.running:
            self._calls.take(news)
            if self._mender is not None and self._mender.is_due:
                self._mender.mend(self._calls.held)
            news = self._ask(guard)
        if news.progress.result is None or news.progress.execution_id != execution_id:
            raise MalformedReply("the broker ended the execution without its result")
        return news

    def _taking(self, guard: _Guard) -> Callable[[News], None]:
        def take(news: News) -> None:
            guard.tools_run()
            self._calls.take(news)

        return take

    def _interrupt(self, execution_id: str) -> None:
        """Stop the execution and wait for its end, which the broker's last resort bounds."""
        give_up_at = time.monotonic() + limits.INTERRUPT_GRACE_S + HOST_GUARD_S
        try:
            self._client.interrupt(self._session_id, execution_id)
            while (left_s := give_up_at - time.monotonic()) > 0:
                wanted = ClaimRequest(limit=0, wait_s=left_s, execution_id=execution_id)
                if not self._client.claim(self._session_id, wanted, late_s=_GUARD_LATE_S).progress.running:
                    return
        except SandboxError as error:
            log.debug("interrupting %s: %s", execution_id, error)


class _Guard:
    """Notices a broker that does not keep its deadline; without a request it knows of none."""

    def __init__(self, request: ExecuteRequest | None) -> None:
        self._stands_still_for_tools = request is not None and not request.timeout_includes_tools
        self._timeout_s = None if request is None else request.timeout_s
        self._started_at = time.monotonic()

    def tools_run(self) -> None:
        """Count anew where the time of tools does not count: exactly how much that was, the broker knows."""
        if self._stands_still_for_tools:
            self._started_at = time.monotonic()

    def patience(self, *, busy: bool) -> tuple[float, float]:
        """Return how long to wait, and how much later than that the answer may come, in seconds.

        Args:
            busy: Whether tools run.

        Raises:
            SessionLost: The broker should have ended the execution long ago.
        """
        left_s = math.inf
        if self._timeout_s is not None:
            if busy:
                self.tools_run()
            now = time.monotonic()
            left_s = self._started_at + self._timeout_s + limits.INTERRUPT_GRACE_S + HOST_GUARD_S - now
        if left_s <= 0:
            raise SessionLost("the sandbox did not end the execution at its deadline", reason="deadline")
        return (POLL_S, LATE_S) if left_s > POLL_S else (left_s, _GUARD_LATE_S)
