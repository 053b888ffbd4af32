"""What a script for ``ScriptedBroker`` is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from broker.protocol.messages import ErrorInfo, ExecuteRequest, Outcome, OutputField, ToolDefinition


class ScriptedToolError(Exception):
    """What ``ScriptedExecution.call`` raises when the host's tool failed.

    Args:
        error: Name and message of its exception.
    """

    def __init__(self, error: ErrorInfo) -> None:
        super().__init__(f"{error.type}: {error.message}")
        self.error = error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What one execution gives.

    Attributes:
        output: Printed text.
        value: Of the last expression.
        display: How a REPL shows it; by default its ``repr``.
        submitted: Given to SUBMIT.
        error: Raised by the code; a ``SyntaxError`` counts as one of the source.
        outcome: Where it does not follow from the above, such as ``Outcome.TIMED_OUT``.
        session_lost: Why the namespace is gone.
        discarded_output_bytes: Printed beyond the limit.
        never_ends: Ends only when it is interrupted or the session is closed.
    """

    output: str = ""
    value: Any = None
    display: str | None = None
    submitted: Mapping[str, Any] | None = None
    error: BaseException | None = None
    outcome: Outcome | None = None
    session_lost: str | None = None
    discarded_output_bytes: int = 0
    never_ends: bool = False


class ScriptedExecution:
    """One execution, as a step that is a function sees it.

    Attributes:
        code: What was to be run.
        variables: What was sent with it, decoded.
        tools: The session's tools by name.
        output_fields: The session's fields of SUBMIT.
        request: The whole request.
    """

    def __init__(
        self,
        request: ExecuteRequest,
        variables: dict[str, Any],
        tools: dict[str, ToolDefinition],
        output_fields: tuple[OutputField, ...],
        call: Callable[[str, str, tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        self.code, self.variables, self.request = request.code, variables, request
        self.tools, self.output_fields = dict(tools), output_fields
        self._call = call

    def call(self, tool: str, *args: Any, **kwargs: Any) -> Any:
        """Call a tool of the host, as generated code does, and return its result.

        Raises:
            ScriptedToolError: The tool failed.
            NameError: There is no such tool.
        """
        if tool not in self.tools:
            raise NameError(f"name {tool!r} is not defined")
        return self._call(self.request.execution_id, tool, args, kwargs)


ScriptedStep = Step | Callable[[ScriptedExecution], Step]


def outcome_of(step: Step) -> Outcome:
    """Return the outcome that follows from what a step gives."""
    if step.submitted is not None:
        return Outcome.SUBMITTED
    if step.session_lost is not None:
        return Outcome.WORKER_DIED
    if step.error is None:
        return Outcome.OK
    return Outcome.SYNTAX_ERROR if isinstance(step.error, SyntaxError) else Outcome.RAISED


def error_of(step: Step) -> ErrorInfo | None:
    """Return a step's error as it travels."""
    if isinstance(step.error, ScriptedToolError):
        return step.error.error
    return None if step.error is None else ErrorInfo(type=type(step.error).__name__, message=str(step.error))
