"""From the broker's result to what DSPy is given: a value, a text, a ``FinalOutput``, or an exception."""

from __future__ import annotations

import dataclasses
from typing import Any

from broker.protocol.messages import ErrorInfo, ExecutionResult, Outcome
from broker.protocol.values import DecodeError, Decoder
from host_client.broker_client import News
from host_client.dspy_compat import DspyContract
from host_client.errors import MalformedReply, SessionLost

_KEPT = {
    Outcome.TIMED_OUT: "It was stopped; the variables set so far were kept.",
    Outcome.INTERRUPTED: "It was stopped; the variables set so far were kept.",
    Outcome.OUTPUT_LIMIT: "It was stopped for printing too much; the variables set so far were kept.",
}
_SYNTAX_ERRORS: dict[str, type[SyntaxError]] = {"IndentationError": IndentationError, "TabError": TabError}
#: How a REPL begins to show the types that come as they are; a table or an array is shown otherwise.
_SHOWN_LIKE_ITSELF: dict[type, str] = {list: "[", dict: "{"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionRecord:
    """Everything about one execution, whatever ``execute`` made of it.

    Attributes:
        outcome: How it ended.
        value: Of the last expression, or the dict given to SUBMIT.
        display: The last expression's value as a REPL shows it, or None.
        output: What was printed, exactly.
        discarded_output_bytes: What was printed beyond the limit.
        error: Where it failed.
        session_lost: Why the namespace is gone, or None.
        duration_s: In the sandbox, in seconds.
    """

    outcome: Outcome
    value: Any = None
    display: str | None = None
    output: str = ""
    discarded_output_bytes: int = 0
    error: ErrorInfo | None = None
    session_lost: str | None = None
    duration_s: float = 0.0

    @property
    def text(self) -> str:
        """What was printed, without trailing newlines, with a note where some of it was thrown away."""
        text = self.output.rstrip("\n")
        if not self.discarded_output_bytes:
            return text
        note = f"[{self.discarded_output_bytes:,} more bytes were printed and thrown away]"
        return f"{text}\n{note}" if text else note


def deliver(record: ExecutionRecord, dspy: DspyContract, *, for_model: bool) -> Any:
    """Return or raise what the installed DSPy expects.

    Args:
        record: The execution.
        dspy: Which classes to use.
        for_model: RLM reads (``output_fields`` are set): printed text and value come together, and a falsy value as
            its text. Otherwise code reads: the value if there is one, else the text.

    Raises:
        SyntaxError: Invalid source.
        SessionLost: The namespace is gone.
        Exception: The class for errors that the model can repair.
    """
    if record.session_lost is not None or record.outcome is Outcome.WORKER_DIED:
        raise dspy.terminal(lost_session(record))
    if record.outcome is Outcome.SUBMITTED:
        return dspy.final_output(record.value)
    if record.outcome is not Outcome.OK:
        raise _failure(record, dspy)
    return _for_model(record) if for_model else _for_code(record)


def _for_code(record: ExecutionRecord) -> Any:
    if record.value is not None:
        return record.value
    if record.display is not None:  # a value that JSON lacks, such as a function
        return record.display
    return record.text or None


def _for_model(record: ExecutionRecord) -> Any:
    shown = _shown(record)
    if not record.text:
        return record.value if _readable(record) else shown
    return record.text if shown is None else f"{record.text}\n{shown}"


def _shown(record: ExecutionRecord) -> str | None:
    if isinstance(record.value, str):
        return record.value or "''"
    if record.display is None and record.value is not None:
        return repr(record.value)
    return record.display


def _readable(record: ExecutionRecord) -> bool:
    """Whether the value itself tells the model no less than its text does."""
    start = _SHOWN_LIKE_ITSELF.get(type(record.value))
    return bool(record.value) and (start is None or record.display is None or record.display.startswith(start))


def _failure(record: ExecutionRecord, dspy: DspyContract) -> Exception:
    message = _describe(record.error)
    if record.outcome in _KEPT:
        message = f"{message}\n{_KEPT[record.outcome]}"
    if record.text:
        message = f"{message}\n\nOutput before the error:\n{record.text}"
    if record.outcome is Outcome.SYNTAX_ERROR:
        kind = record.error.type if record.error else ""
        return _SYNTAX_ERRORS.get(kind, SyntaxError)(message)
    return dspy.code_error(message)


def _describe(error: ErrorInfo | None) -> str:
    if error is None:
        return "the code failed"
    last = f"{error.type}: {error.message}" if error.message else error.type
    frames = error.traceback.rstrip()
    return last if not frames else frames if last.rstrip() in frames else f"{frames}\n{last}"


def lost_session(record: ExecutionRecord) -> SessionLost:
    """Return the error for an execution with which the session was lost."""
    reason = record.session_lost or "crashed"
    message = f"the sandbox's session was lost ({reason}); its variables are gone"
    if record.error is not None:
        message = f"{message}: {record.error.message or record.error.type}"
    if record.text:
        message = f"{message}\n\nOutput before that:\n{record.text}"
    return SessionLost(message, reason=reason)


def read_record(news: News) -> ExecutionRecord:
    """Read a result; everything in it counts as hostile.

    Raises:
        MalformedReply: A value that breaks the rules.
    """
    result = news.progress.result
    assert isinstance(result, ExecutionResult)
    try:
        value = Decoder(news.blobs).decode(result.value)
    except DecodeError as error:
        raise MalformedReply(f"the result's value is malformed: {error}") from None
    if result.outcome is Outcome.SUBMITTED and not (isinstance(value, dict) and all(type(k) is str for k in value)):
        raise MalformedReply("what was submitted is not an object")
    return ExecutionRecord(
        outcome=result.outcome,
        value=value,
        display=result.display,
        output=result.output,
        discarded_output_bytes=result.discarded_output_bytes,
        error=result.error,
        session_lost=result.session_lost,
        duration_s=result.duration_s,
    )
