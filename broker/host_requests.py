"""What the host asks most often, apart from how it arrives: over HTTP (``host_api``) or framed (``framed``)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from broker.errors import BadRequest, BrokerError
from broker.live_session import LiveSession, WithBlobs
from broker.protocol import limits, reading
from broker.protocol.blob_file import Blobs
from broker.protocol.frames import Blob
from broker.protocol.messages import ClaimRequest, ExecuteRequest, ToolResult
from broker.query import TargetQuery, query_number
from broker.sessions import Sessions
from broker.tool_calls import ToolCall
from broker.waiting import Deliver, Waiter

JsonObject = dict[str, Any]
Query = Mapping[str, str]


class Wishes(NamedTuple):
    """What the query of an execution or of a claim says.

    Attributes:
        claim: How long to wait, and which claims to take (executions only).
        epoch: The caller's; one that names none is the session's creator.
        stream: Whether one request may have many answers.
        lane: Whether the worker has the execution from the host itself.
    """

    claim: ClaimRequest
    epoch: int
    stream: bool
    lane: bool


def execute(
    session: LiveSession, query: Query, body: JsonObject, blobs: Sequence[Blob], still_there: Callable[[], bool]
) -> WithBlobs:
    """Start an execution and wait for its first tool calls or its end. The body is an ExecuteRequest."""
    wishes = read_wishes(query)
    session.core.check_epoch(wishes.epoch)  # after the body was read, which may have taken a while
    return session.run(ExecuteRequest.from_json(body), blobs, wishes.claim, still_there)


def execute_later(
    session: LiveSession,
    query: Query,
    body: JsonObject,
    blobs: Blobs,
    still_there: Callable[[], bool],
    deliver: Deliver[WithBlobs | None],
) -> Callable[[], None] | None:
    """As ``execute``, without waiting. With ``stream=1`` one request brings all tool calls of the execution.

    With ``lane=1`` the worker may have told the host its result itself: then None is delivered.

    Returns:
        What ends the wait where nobody wants its answer any more, or None where it was answered.
    """
    wishes = read_wishes(query)
    try:
        session.core.check_epoch(wishes.epoch)
        request = ExecuteRequest.from_json(body)
        waiter = session.run_later(
            request, blobs, wishes.claim, still_there, deliver, stream=wishes.stream, on_lane=wishes.lane
        )
    except (BrokerError, reading.BadRequest):
        if wishes.lane:
            session.end_lane()  # what is refused here must not run there
        raise
    return ending(session, waiter)


def claim(session: LiveSession, query: Query, body: JsonObject, still_there: Callable[[], bool]) -> WithBlobs:
    """Wait for tool calls or the execution's end. The body is a ClaimRequest."""
    wanted = ClaimRequest.from_json(body)
    check_epoch(session, query)
    return session.claim(wanted, still_there)


def claim_later(
    session: LiveSession,
    query: Query,
    body: JsonObject,
    still_there: Callable[[], bool],
    deliver: Deliver[WithBlobs | None],
) -> Callable[[], None] | None:
    """As ``claim``, without waiting; see ``execute_later``."""
    wanted, wishes = ClaimRequest.from_json(body), read_wishes(query)
    session.core.check_epoch(wishes.epoch)
    return ending(session, session.claim_later(wanted, still_there, deliver, stream=wishes.stream))


def answer(
    sessions: Sessions, call_id: str, query: Query, body: JsonObject, blobs: Blobs, size: int, *, reads: bool = True
) -> tuple[LiveSession, ToolCall]:
    """Store a tool's answer. The body is a ToolResult; ``reads`` is ``Sessions.tool_call``'s."""
    if size > limits.MAX_TOOL_CALL_BYTES:
        raise BadRequest(f"an answer of {size} bytes; at most {limits.MAX_TOOL_CALL_BYTES} are taken")
    session, _ = sessions.tool_call(call_id, reads=reads)
    check_epoch(session, query)
    return session, session.finish_call(call_id, ToolResult.from_json(body), blobs, size)


def check_epoch(session: LiveSession, query: Query) -> None:
    """Refuse a client that no longer holds the session; one that names no epoch is its creator."""
    session.core.check_epoch(_epoch(query))


def ending(session: LiveSession, waiter: Waiter | None) -> Callable[[], None] | None:
    """Return what ends a wait where nobody wants its answer any more, or None where it is over."""
    return None if waiter is None else partial(session.stop_waiting, waiter)


def read_wishes(query: Query) -> Wishes:
    """Read a query, or remember what it said.

    Raises:
        BadRequest: It makes no sense.
    """
    return _kept_wishes(query) if isinstance(query, TargetQuery) else _wishes(query)


def _wishes(query: Query) -> Wishes:
    wanted = ClaimRequest(
        limit=int(query_number(query, "limit", limits.DEFAULT_CONCURRENT_TOOL_CALLS, high=10_000)),
        wait_s=query_number(query, "wait_s", 0.0),
        lease_s=query_number(query, "lease_s", limits.DEFAULT_LEASE_S, low=0.01),
        start=query_number(query, "start", 1) != 0,
    )
    stream, lane = (query_number(query, name, 0) != 0 for name in ("stream", "lane"))
    return Wishes(wanted, _epoch(query), stream, lane)


_kept_wishes = functools.lru_cache(maxsize=256)(_wishes)


def _epoch(query: Query) -> int:
    return int(query_number(query, "epoch", 1, low=1, high=1 << 53))
