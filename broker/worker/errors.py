"""What a tool wrapper raises in generated code."""

from __future__ import annotations

import builtins
from typing import Any

from broker.protocol.messages import CallState, ErrorInfo


class ToolError(RuntimeError):
    """A tool failed on the host with an exception that is no builtin one.

    Attributes:
        type: Name of the exception's class on the host.
    """

    def __init__(self, message: str, *, type: str = "Exception") -> None:
        super().__init__(message)
        self.type = type


class ToolOutcomeUnknown(ToolError):
    """The host went away while the tool ran: it may or may not have had its effect."""


class BrokerGone(RuntimeError):
    """The broker does not answer; the sandbox is about to end."""


def error_of(tool: str, state: CallState, error: ErrorInfo | None) -> Exception:
    """Return the exception for a call that ended in ``state`` without a value."""
    if state is CallState.UNKNOWN:
        message = error.message if error else f"nobody knows whether {tool}() ran: the host went away"
        return ToolOutcomeUnknown(message, type=error.type if error else "ToolOutcomeUnknown")
    if error is None:
        return ToolError(f"the call of {tool}() was {state.value}", type=state.value)
    return _builtin_error(error) or ToolError(f"{error.type}: {error.message}", type=error.type)


def _builtin_error(error: ErrorInfo) -> Exception | None:
    """Return the builtin exception of that name, or of its nearest base that takes a single message."""
    kind = getattr(builtins, error.type, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return None
    if kind is Exception:
        return Exception(error.message)
    for base in kind.__mro__[: kind.__mro__.index(Exception)]:
        try:
            return _with_text(base, error.message)
        except TypeError:  # such as UnicodeDecodeError, which wants five arguments
            continue
    return None


def _with_text(kind: Any, message: str) -> Exception:
    raised: Exception = kind(message)
    return raised if str(raised) == message else _rebuilt(kind, message)


def _rebuilt(kind: Any, message: str) -> Exception:
    """An instance of a subclass whose text is the message: ``str(KeyError("x"))`` is ``'x'`` with quotes."""
    methods = {
        "__str__": lambda self: self.args[0],
        "__reduce__": lambda self: (_rebuilt, (kind, self.args[0])),
        "__module__": "builtins",
    }
    raised: Exception = type(kind.__name__, (kind,), methods)(message)
    return raised
