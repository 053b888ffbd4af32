"""What the host asks most often, apart from how it arrives: over HTTP (``host_api``) or framed (``framed``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from broker.errors import BadRequest
from broker.live_session import LiveSession, WithBlobs
from broker.protocol import limits
from broker.protocol.frames import Blob
from broker.protocol.messages import ClaimRequest, ExecuteRequest, ToolResult
from broker.query import query_number
from broker.sessions import Sessions
from broker.tool_calls import ToolCall
from broker.waiting import Deliver, Waiter

JsonObject = dict[str, Any]
Query = Mapping[str, str]


def execute(
    session: LiveSession, query: Query, body: JsonObject, blobs: Sequence[Blob], still_there: Callable[[], bool]
) -> WithBlobs:
    """Start an execution and wait for its first tool calls or its end. The body is an ExecuteRequest."""
    wanted, request = _read_execution(session, query, body)
    return session.run(request, blobs, wanted, still_there)


def execute_later(
    session: LiveSession,
    query: Query,
    body: JsonObject,
    blobs: Sequence[Blob],
    still_there: Callable[[], bool],
    deliver: Deliver[WithBlobs],
) -> Callable[[], None] | None:
    """As ``execute``, without waiting. With ``stream=1`` one request brings all tool calls of the execution.

    Returns:
        What ends the wait where nobody wants its answer any more, or None where it was answered.
    """
    wanted, request = _read_execution(session, query, body)
    return ending(session, session.run_later(request, blobs, wanted, still_there, deliver, stream=_streams(query)))


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
    deliver: Deliver[WithBlobs],
) -> Callable[[], None] | None:
    """As ``claim``, without waiting; see ``execute_later``."""
    wanted = ClaimRequest.from_json(body)
    check_epoch(session, query)
    return ending(session, session.claim_later(wanted, still_there, deliver, stream=_streams(query)))


def answer(
    sessions: Sessions, call_id: str, query: Query, body: JsonObject, blobs: Sequence[Blob], size: int
) -> tuple[LiveSession, ToolCall]:
    """Store a tool's answer. The body is a ToolResult."""
    if size > limits.MAX_TOOL_CALL_BYTES:
        raise BadRequest(f"an answer of {size} bytes; at most {limits.MAX_TOOL_CALL_BYTES} are taken")
    session, _ = sessions.tool_call(call_id)
    check_epoch(session, query)
    return session, session.finish_call(call_id, ToolResult.from_json(body), blobs, size)


def check_epoch(session: LiveSession, query: Query) -> None:
    """Refuse a client that no longer holds the session; one that names no epoch is its creator."""
    session.core.check_epoch(int(query_number(query, "epoch", 1, low=1, high=1 << 53)))


def _read_execution(session: LiveSession, query: Query, body: JsonObject) -> tuple[ClaimRequest, ExecuteRequest]:
    wanted = ClaimRequest(
        limit=int(query_number(query, "limit", limits.DEFAULT_CONCURRENT_TOOL_CALLS, high=10_000)),
        wait_s=query_number(query, "wait_s", 0.0),
        lease_s=query_number(query, "lease_s", limits.DEFAULT_LEASE_S, low=0.01),
        start=query_number(query, "start", 1) != 0,
    )
    check_epoch(session, query)  # after the body was read, which may have taken a while
    return wanted, ExecuteRequest.from_json(body)


def _streams(query: Query) -> bool:
    return query_number(query, "stream", 0) != 0


def ending(session: LiveSession, waiter: Waiter | None) -> Callable[[], None] | None:
    """Return what ends a wait where nobody wants its answer any more, or None where it is over."""
    return None if waiter is None else partial(session.stop_waiting, waiter)
