"""Running one piece of code: the request, and how it ended."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from broker.protocol import limits
from broker.protocol.reading import BadRequest, JsonObject, Reader
from broker.protocol.tools import OutputField, ToolDefinition


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


#: What a worker may report; the other outcomes are the broker's to tell.
_REPORTABLE = frozenset({Outcome.OK, Outcome.SUBMITTED, Outcome.RAISED, Outcome.SYNTAX_ERROR, Outcome.INTERRUPTED})


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


@dataclasses.dataclass(slots=True, kw_only=True)
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

    def to_worker(self) -> JsonObject:
        """Return the header of the worker's frame: the request without what only the broker needs."""
        header: JsonObject = {
            "type": "execute",
            "execution_id": self.execution_id,
            "code": self.code,
            "variables": self.variables,
            "drop": list(self.drop),
        }
        if self.tools is not None:
            header["tools"] = [tool.to_json() for tool in self.tools]
        if self.output_fields is not None:
            header["output_fields"] = [field.to_json() for field in self.output_fields]
        return header

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
            max_output_bytes=read.integer("max_output_bytes", limits.MAX_OUTPUT_BYTES, high=limits.MOST_OUTPUT_BYTES),
        )


@dataclasses.dataclass(slots=True, kw_only=True)
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
        session_lost: Why the namespace is gone (``deadline``, ``oom``, ``crashed(SIGSEGV)``, ...); None while it lives.
        duration_s: From start to end, in seconds.
        output_blob: On its way to the host: the index of the blob that is its output, or None; see ``raw_output``.
    """

    outcome: Outcome
    output: str = ""
    discarded_output_bytes: int = 0
    value: Any = None
    display: str | None = None
    error: ErrorInfo | None = None
    session_lost: str | None = None
    duration_s: float = 0.0
    output_blob: int | None = None

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
    def reported(cls, data: Any) -> ExecutionResult:
        """Read what a worker says of an execution of its own: how it ended, and nothing that it cannot know.

        Its ``printed`` is what it has taken out of the pipe itself.

        Raises:
            BadRequest: It makes no sense, or is not a worker's to tell.
        """
        read = Reader(data, "worker's result")
        outcome = read.member("outcome", Outcome)
        if outcome not in _REPORTABLE:
            raise BadRequest(f"a worker cannot report {outcome.value}")
        display = read.optional_text("display")
        return cls(
            outcome=outcome,
            output=read.text("printed", "", max_chars=limits.MAX_LANE_OUTPUT_BYTES),
            value=read.raw("value", None),
            display=display if display is None else display[: limits.MAX_DISPLAY_CHARS],
            error=ErrorInfo.from_json(read.raw("error")) if read.has("error") else None,
        )

    @classmethod
    def from_json(cls, data: Any) -> ExecutionResult:
        read = Reader(data, "execution result")
        return cls(
            outcome=read.member("outcome", Outcome),
            output=read.text("output", ""),
            discarded_output_bytes=read.integer("discarded_output_bytes", 0),
            value=read.raw("value", None),
            display=read.optional_text("display"),
            error=ErrorInfo.from_json(read.raw("error")) if read.has("error") else None,
            session_lost=read.optional_text("session_lost"),
            duration_s=read.number("duration_s", 0.0),
            output_blob=read.integer("output_blob", low=0) if read.has("output_blob") else None,
        )
