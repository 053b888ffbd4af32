"""The messages of both planes and of the worker's channel, as frozen dataclasses with strict readers.

``to_json`` gives the JSON object; ``from_json`` reads one and raises ``BadRequest`` that names the
field. Fields called ``value``, ``args``, ``kwargs`` and ``variables`` hold encoded values
(``broker.protocol.values``): the broker passes them on without looking inside.
"""

from __future__ import annotations

import dataclasses
import enum
import keyword
from typing import Any

from broker.protocol import limits
from broker.protocol.reading import BadRequest, Reader

JsonObject = dict[str, Any]


class Outcome(str, enum.Enum):
    """How an execution ended."""

    OK = "ok"
    SUBMITTED = "submitted"
    RAISED = "raised"
    SYNTAX_ERROR = "syntax_error"
    TIMED_OUT = "timed_out"
    INTERRUPTED = "interrupted"
    WORKER_DIED = "worker_died"
    OUTPUT_LIMIT = "output_limit"


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolParameter:
    """One parameter of a tool.

    Attributes:
        name: As in the host's function.
        kind: ``positional_only``, ``positional_or_keyword``, ``var_positional``, ``keyword_only`` or ``var_keyword``.
        default: Text of the default (its ``repr``), or None where there is none. Shown only: the host applies it.
        annotation: Text of the annotation, or None.
    """

    name: str
    kind: str
    default: str | None = None
    annotation: str | None = None

    KINDS = ("positional_only", "positional_or_keyword", "var_positional", "keyword_only", "var_keyword")

    def to_json(self) -> JsonObject:
        return {"name": self.name, "kind": self.kind, "default": self.default, "annotation": self.annotation}

    @classmethod
    def from_json(cls, data: Any) -> ToolParameter:
        read = Reader(data, "tool parameter")
        kind = read.text("kind")
        if kind not in cls.KINDS:
            raise BadRequest(f"tool parameter: unknown kind {kind!r}")
        return cls(
            name=_identifier(read.text("name"), "tool parameter"),
            kind=kind,
            default=read.optional_text("default"),
            annotation=read.optional_text("annotation"),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolDefinition:
    """What generated code sees of a tool.

    Attributes:
        name: Global name in the session.
        parameters: Its parameters, or None where the host could not read a signature (then anything is passed on).
        doc: Docstring for ``help(tool)``.
        returns: Text of the return annotation, or None.
    """

    name: str
    parameters: tuple[ToolParameter, ...] | None
    doc: str = ""
    returns: str | None = None

    def to_json(self) -> JsonObject:
        parameters = None if self.parameters is None else [p.to_json() for p in self.parameters]
        return {"name": self.name, "parameters": parameters, "doc": self.doc, "returns": self.returns}

    @classmethod
    def from_json(cls, data: Any) -> ToolDefinition:
        read = Reader(data, "tool")
        parameters = None
        if read.has("parameters"):
            parameters = tuple(ToolParameter.from_json(p) for p in read.items("parameters"))
        return cls(
            name=_identifier(read.text("name"), "tool"),
            parameters=parameters,
            doc=read.text("doc", ""),
            returns=read.optional_text("returns"),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputField:
    """One output field of SUBMIT; ``type`` is a builtin's name (``str int float bool list dict NoneType``) or None."""

    name: str
    type: str | None = None

    def to_json(self) -> JsonObject:
        return {"name": self.name} if self.type is None else {"name": self.name, "type": self.type}

    @classmethod
    def from_json(cls, data: Any) -> OutputField:
        read = Reader(data, "output field")
        return cls(name=_identifier(read.text("name"), "output field"), type=read.optional_text("type"))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExecuteRequest:
    """Run one piece of code.

    Attributes:
        execution_id: Chosen by the host; posting it again returns the stored progress and runs nothing.
        code: Python source.
        variables: Encoded values by name, set in the namespace before the code runs.
        tools: Tools from now on, or None for no change.
        output_fields: Fields of SUBMIT from now on (an empty tuple: any), or None for no change.
        drop: Ids of kept values that the host will not refer to again.
        timeout_s: Deadline in seconds, or None.
        timeout_includes_tools: Whether time spent waiting for the host's tools counts.
        max_output_bytes: Output kept; the rest is counted and thrown away.
    """

    execution_id: str
    code: str
    variables: JsonObject = dataclasses.field(default_factory=dict)
    tools: tuple[ToolDefinition, ...] | None = None
    output_fields: tuple[OutputField, ...] | None = None
    drop: tuple[str, ...] = ()
    timeout_s: float | None = None
    timeout_includes_tools: bool = True
    max_output_bytes: int = limits.MAX_OUTPUT_BYTES

    def to_json(self) -> JsonObject:
        data: JsonObject = {"execution_id": self.execution_id, "code": self.code}
        if self.variables:
            data["variables"] = self.variables
        if self.tools is not None:
            data["tools"] = [tool.to_json() for tool in self.tools]
        if self.output_fields is not None:
            data["output_fields"] = [field.to_json() for field in self.output_fields]
        if self.drop:
            data["drop"] = list(self.drop)
        data["timeout_s"] = self.timeout_s
        data["timeout_includes_tools"] = self.timeout_includes_tools
        data["max_output_bytes"] = self.max_output_bytes
        return data

    @classmethod
    def from_json(cls, data: Any) -> ExecuteRequest:
        read = Reader(data, "execution")
        tools = fields = None
        if read.has("tools"):
            tools = tuple(ToolDefinition.from_json(tool) for tool in read.items("tools"))
        if read.has("output_fields"):
            fields = tuple(OutputField.from_json(field) for field in read.items("output_fields"))
        return cls(
            execution_id=read.text("execution_id", max_chars=64),
            code=read.text("code"),
            variables=read.mapping("variables", {}),
            tools=tools,
            output_fields=fields,
            drop=tuple(read.texts("drop", [])),
            timeout_s=read.optional_number("timeout_s", low=0.001),
            timeout_includes_tools=read.flag("timeout_includes_tools", True),
            max_output_bytes=read.integer("max_output_bytes", limits.MAX_OUTPUT_BYTES, high=1 << 30),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    """An exception as text.

    Attributes:
        type: Name of the exception's class, such as ``ValueError``.
        message: Its text.
        traceback: Formatted frames of generated code, empty where there are none.
        lineno: Line of the generated code, or None.
    """

    type: str
    message: str
    traceback: str = ""
    lineno: int | None = None

    def to_json(self) -> JsonObject:
        return {"type": self.type, "message": self.message, "traceback": self.traceback, "lineno": self.lineno}

    @classmethod
    def from_json(cls, data: Any) -> ErrorInfo:
        read = Reader(data, "error")
        return cls(
            type=read.text("type", max_chars=200),
            message=read.text("message"),
            traceback=read.text("traceback", ""),
            lineno=read.integer("lineno") if read.has("lineno") else None,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionResult:
    """How an execution ended and what it left.

    Attributes:
        outcome: See ``Outcome``.
        output: What was printed (stdout and stderr as they came), at most ``max_output_bytes`` of it.
        discarded_output_bytes: What was printed beyond that.
        value: Encoded value: of the last expression (``ok``, None where there is none), or the dict given
            to SUBMIT (``submitted``).
        display: The last expression's value as a REPL shows it, or None.
        error: For every outcome but ``ok`` and ``submitted``.
        session_lost: Why the namespace is gone (``deadline``, ``oom``, ``crashed(SIGSEGV)``, ...), or None while it lives.
        duration_s: From start to end, in seconds.
    """

    outcome: Outcome
    output: str = ""
    discarded_output_bytes: int = 0
    value: Any = None
    display: str | None = None
    error: ErrorInfo | None = None
    session_lost: str | None = None
    duration_s: float = 0.0

    def to_json(self) -> JsonObject:
        return {
            "outcome": self.outcome.value,
            "output": self.output,
            "discarded_output_bytes": self.discarded_output_bytes,
            "value": self.value,
            "display": self.display,
            "error": None if self.error is None else self.error.to_json(),
            "session_lost": self.session_lost,
            "duration_s": self.duration_s,
        }

    @classmethod
    def from_json(cls, data: Any) -> ExecutionResult:
        read = Reader(data, "execution result")
        return cls(
            outcome=_member(Outcome, read.text("outcome")),
            output=read.text("output", ""),
            discarded_output_bytes=read.integer("discarded_output_bytes", 0),
            value=read.raw("value", None),
            display=read.optional_text("display"),
            error=ErrorInfo.from_json(read.raw("error")) if read.has("error") else None,
            session_lost=read.optional_text("session_lost"),
            duration_s=read.number("duration_s", 0.0),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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
    """

    call_id: str
    attempt: int
    tool: str
    args: list[Any]
    kwargs: JsonObject
    execution_id: str
    lease_s: float
    blob_range: tuple[int, int] = (0, 0)

    def to_json(self) -> JsonObject:
        return {**dataclasses.asdict(self), "blob_range": list(self.blob_range)}

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
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The reply to posting an execution and to asking for claims.

    Attributes:
        execution_id: The execution that this is about, or None where none was ever posted.
        running: Whether it still runs.
        result: Its result once it has ended.
        claims: Tool calls that are the host's to answer from now on.
        lost: Call ids of ``renew`` that are no longer the host's.
    """

    execution_id: str | None
    running: bool
    result: ExecutionResult | None = None
    claims: tuple[Claim, ...] = ()
    lost: tuple[str, ...] = ()

    def to_json(self) -> JsonObject:
        return {
            "execution_id": self.execution_id,
            "running": self.running,
            "result": None if self.result is None else self.result.to_json(),
            "claims": [claim.to_json() for claim in self.claims],
            "lost": list(self.lost),
        }

    @classmethod
    def from_json(cls, data: Any) -> Progress:
        read = Reader(data, "progress")
        return cls(
            execution_id=read.optional_text("execution_id"),
            running=read.flag("running"),
            result=ExecutionResult.from_json(read.raw("result")) if read.has("result") else None,
            claims=tuple(Claim.from_json(claim) for claim in read.items("claims", [])),
            lost=tuple(read.texts("lost", [])),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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
        return dataclasses.asdict(self)

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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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
            state=_member(CallState, read.text("state")),
            value=read.raw("value", None),
            error=ErrorInfo.from_json(read.raw("error")) if read.has("error") else None,
        )


def _identifier(name: str, where: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise BadRequest(f"{where}: {name[:80]!r} is not a Python identifier")
    return name


def _held(pair: Any) -> tuple[str, int]:
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or type(pair[1]) is not int:
        raise BadRequest("claim request: 'renew' must list [call_id, attempt] pairs")
    return pair[0], pair[1]


def _range(pair: list[Any]) -> tuple[int, int]:
    if len(pair) != 2 or not all(type(bound) is int for bound in pair) or not 0 <= pair[0] <= pair[1]:
        raise BadRequest("claim: 'blob_range' must be [first, end)")
    return pair[0], pair[1]


def _member(kind: Any, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise BadRequest(f"unknown {kind.__name__.lower()} {text[:40]!r}") from None
