"""Tool calls on both planes: submitting, claiming, answering, and the progress that carries claims."""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Any

from broker.protocol import limits
from broker.protocol.executions import ErrorInfo, ExecutionResult
from broker.protocol.reading import BadRequest, JsonObject, Reader

_LANE_KEY = re.compile(r"[0-9a-f]{1,12}")
_MOST_ID_CHARS = 64


class CallState(str, enum.Enum):
    """The states of a tool call; the drawing is in ``docs/protocol.md``."""

    QUEUED = "queued"
    LEASED = "leased"
    STARTED = "started"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    UNKNOWN = "unknown"


@dataclasses.dataclass(slots=True, kw_only=True)
class Claim:
    """A tool call that the host has taken.

    Attributes:
        call_id: Given by the broker.
        attempt: 1-based claim count; the right to answer is (call_id, attempt).
        tool: Name of the tool.
        args: Encoded positional arguments.
        kwargs: Encoded keyword arguments.
        execution_id: The execution that made the call.
        lease_s: Seconds until the claim is taken away unless it is renewed.
        blob_range: [first, end) of this claim's blobs in the frame that carries it.
        key: Idempotency key: the same for every attempt at this call, and for no other call.
    """

    call_id: str
    attempt: int
    tool: str
    args: list[Any]
    kwargs: JsonObject
    execution_id: str
    lease_s: float
    blob_range: tuple[int, int] = (0, 0)
    key: str = ""

    def to_json(self) -> JsonObject:
        return {
            "call_id": self.call_id,
            "attempt": self.attempt,
            "tool": self.tool,
            "args": self.args,
            "kwargs": self.kwargs,
            "execution_id": self.execution_id,
            "lease_s": self.lease_s,
            "blob_range": list(self.blob_range),
            "key": self.key,
        }

    @classmethod
    def from_json(cls, data: Any) -> Claim:
        read = Reader(data, "claim")
        return cls(
            call_id=read.text("call_id", max_chars=64),
            attempt=read.integer("attempt", low=1),
            tool=read.text("tool"),
            args=read.items("args"),
            kwargs=read.mapping("kwargs"),
            execution_id=read.text("execution_id", max_chars=64),
            lease_s=read.number("lease_s"),
            blob_range=_range(read.items("blob_range", [0, 0])),
            key=read.text("key", "", max_chars=64),
        )


@dataclasses.dataclass(slots=True, kw_only=True)
class ClaimRequest:
    """Ask for tool calls, and for news of an execution.

    Attributes:
        limit: At most so many claims; 0 asks for news only.
        wait_s: How long to wait for a claim or for the end of the execution.
        lease_s: Lease for the claims, and for those renewed.
        renew: ``[call_id, attempt]`` of claims that the host still works on.
        start: Count the claims as started at once (the host runs them now); a started call whose lease
            is lost ends as ``unknown`` instead of being handed out again.
        execution_id: The execution whose end wakes the wait, or None for the running one.
    """

    limit: int = limits.DEFAULT_CONCURRENT_TOOL_CALLS
    wait_s: float = 0.0
    lease_s: float = limits.DEFAULT_LEASE_S
    renew: tuple[tuple[str, int], ...] = ()
    start: bool = True
    execution_id: str | None = None

    def to_json(self) -> JsonObject:
        return {
            "limit": self.limit,
            "wait_s": self.wait_s,
            "lease_s": self.lease_s,
            "renew": [list(held) for held in self.renew],
            "start": self.start,
            "execution_id": self.execution_id,
        }

    @classmethod
    def from_json(cls, data: Any) -> ClaimRequest:
        read = Reader(data, "claim request")
        return cls(
            limit=read.integer("limit", limits.DEFAULT_CONCURRENT_TOOL_CALLS, high=10_000),
            wait_s=read.number("wait_s", 0.0),
            lease_s=read.number("lease_s", limits.DEFAULT_LEASE_S, low=0.01, high=86_400),
            renew=tuple(_held(pair) for pair in read.items("renew", [])),
            start=read.flag("start", True),
            execution_id=read.optional_text("execution_id", max_chars=64),
        )


@dataclasses.dataclass(slots=True, kw_only=True)
class Progress:
    """The reply to posting an execution and to asking for claims.

    Attributes:
        execution_id: The execution that this is about, or None where none was ever posted.
        running: Whether it still runs.
        result: Its result once it has ended.
        claims: Tool calls that are the host's to answer from now on.
        lost: Call ids of ``renew`` that are no longer the host's.
        more: Whether another answer to the same request follows (framed form, ``stream=1``).
        lane: Whether the next execution may come on the lane.
    """

    execution_id: str | None
    running: bool
    result: ExecutionResult | None = None
    claims: tuple[Claim, ...] = ()
    lost: tuple[str, ...] = ()
    more: bool = False
    lane: bool = False

    def to_json(self) -> JsonObject:
        data: JsonObject = {
            "execution_id": self.execution_id,
            "running": self.running,
            "result": None if self.result is None else self.result.to_json(),
            "claims": [claim.to_json() for claim in self.claims] if self.claims else [],
            "lost": list(self.lost),
        }
        if self.more:
            data["more"] = True
        if self.lane:
            data["lane"] = True
        return data

    @classmethod
    def from_json(cls, data: Any) -> Progress:
        read = Reader(data, "progress")
        return cls(
            execution_id=read.optional_text("execution_id"),
            running=read.flag("running"),
            result=ExecutionResult.from_json(read.raw("result")) if read.has("result") else None,
            claims=tuple(map(Claim.from_json, read.items("claims", []))),
            lost=tuple(read.texts("lost", [])),
            more=read.flag("more", False),
            lane=read.flag("lane", False),
        )


@dataclasses.dataclass(slots=True, kw_only=True)
class ToolResult:
    """The host's answer to a claim: a value, or an error (then ``value`` is ignored)."""

    attempt: int
    value: Any = None
    error: ErrorInfo | None = None

    def to_json(self) -> JsonObject:
        return {
            "attempt": self.attempt,
            "value": self.value,
            "error": None if self.error is None else self.error.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any) -> ToolResult:
        read = Reader(data, "tool result")
        return cls(
            attempt=read.integer("attempt", low=1),
            value=read.raw("value", None),
            error=ErrorInfo.from_json(read.raw("error")) if read.has("error") else None,
        )


@dataclasses.dataclass(slots=True, kw_only=True)
class ToolCallRequest:
    """Guest plane: generated code calls a tool.

    Attributes:
        key: Chosen by the caller; posting it again asks for the same call.
        execution_id: The execution that the caller belongs to.
        tool: Name of the tool.
        args: Encoded positional arguments.
        kwargs: Encoded keyword arguments.
        wait_s: How long to wait for the answer.
    """

    key: str
    execution_id: str
    tool: str
    args: list[Any] = dataclasses.field(default_factory=list)
    kwargs: JsonObject = dataclasses.field(default_factory=dict)
    wait_s: float = limits.MAX_WAIT_S

    def to_json(self) -> JsonObject:
        return {
            "key": self.key,
            "execution_id": self.execution_id,
            "tool": self.tool,
            "args": self.args,
            "kwargs": self.kwargs,
            "wait_s": self.wait_s,
        }

    @classmethod
    def from_json(cls, data: Any) -> ToolCallRequest:
        read = Reader(data, "tool call")
        return cls(
            key=read.text("key", max_chars=64),
            execution_id=read.text("execution_id", max_chars=64),
            tool=read.text("tool", max_chars=200),
            args=read.items("args", []),
            kwargs=read.mapping("kwargs", {}),
            wait_s=read.number("wait_s", limits.MAX_WAIT_S),
        )


@dataclasses.dataclass(slots=True, kw_only=True)
class ToolCallStatus:
    """Guest plane: where a tool call stands; ``value`` is set in ``done``, ``error`` in the other terminal states."""

    call_id: str
    state: CallState
    value: Any = None
    error: ErrorInfo | None = None

    def to_json(self) -> JsonObject:
        return {
            "call_id": self.call_id,
            "state": self.state.value,
            "value": self.value,
            "error": None if self.error is None else self.error.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any) -> ToolCallStatus:
        read = Reader(data, "tool call status")
        return cls(
            call_id=read.text("call_id", max_chars=64),
            state=read.member("state", CallState),
            value=read.raw("value", None),
            error=ErrorInfo.from_json(read.raw("error")) if read.has("error") else None,
        )


def lane_call_id(request: ToolCallRequest) -> str:
    """Return the id of a call that goes by the lane: host and broker, who hear of it apart, must come to the same.

    Raises:
        BadRequest: Its key is not one of those that the worker counts.
    """
    call_id = f"{request.execution_id}-{request.key}"
    if not _LANE_KEY.fullmatch(request.key) or len(call_id) > _MOST_ID_CHARS:
        raise BadRequest("tool call: 'key' is none of the lane's")
    return call_id


def _held(pair: Any) -> tuple[str, int]:
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or type(pair[1]) is not int:
        raise BadRequest("claim request: 'renew' must list [call_id, attempt] pairs")
    return pair[0], pair[1]


def _range(pair: list[Any]) -> tuple[int, int]:
    if len(pair) != 2 or not all(type(bound) is int for bound in pair) or not 0 <= pair[0] <= pair[1]:
        raise BadRequest("claim: 'blob_range' must be [first, end)")
    return pair[0], pair[1]
