"""Every error that the broker answers with; the table with statuses is in ``docs/protocol.md``.

::

    BrokerError
    ├ BadRequest            400  a field is missing, of the wrong type or out of range; a broken frame
    ├ Forbidden             403  this user may not speak on this socket
    ├ UnknownRoute          404
    ├ UnknownSession        404
    ├ UnknownExecution      404
    ├ UnknownCall           404
    ├ UnknownTool           404  the message lists the tools that there are
    ├ UnknownSnapshot       404  the session has no such snapshot (any more)
    ├ WrongMethod           405
    ├ SessionBusy           409  an execution is running
    ├ LeaseExpired          409  somebody else holds the call now
    ├ Fenced                409  another client holds the session now
    ├ NameTaken             409  another session of this sandbox has that name
    ├ ExecutionEnded        409  a tool call from an execution that is not running
    ├ SessionLost           410  the namespace is gone; ``reason`` says why
    ├ CallGone              410  the call ended without this answer
    ├ LengthRequired        411
    ├ PayloadTooLarge       413
    ├ FileMissing           424  the file that a frame announced did not come with it; as bytes it would
    ├ UpgradeRequired       426  the path speaks frames only
    ├ TooManySessions       429
    ├ TooManyCalls          429
    ├ TooManySnapshots      429  of one session
    ├ TooManyForks          429  of one family: sessions and snapshots that come from one session
    ├ InternalError         500
    ├ SessionStartFailed    503
    └ ForkFailed            503  the session goes on as it was
"""

from __future__ import annotations

from typing import Any, ClassVar


class BrokerError(Exception):
    """Root of the errors that cross the wire.

    Args:
        message: What happened, for whoever asked.
    """

    code: ClassVar[str] = "broker_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def to_json(self) -> dict[str, Any]:
        """Return the body of the reply."""
        return {"error": {"code": self.code, "message": self.message}}


class BadRequest(BrokerError):
    """A field is missing, of the wrong type or out of range, or the body is no frame."""

    code, status = "bad_request", 400


class Forbidden(BrokerError):
    """The user at the other end may not speak on this socket."""

    code, status = "forbidden", 403


class UnknownRoute(BrokerError):
    """Nothing is served under this path."""

    code, status = "unknown_route", 404


class UnknownSession(BrokerError):
    """No session has this id."""

    code, status = "unknown_session", 404


class UnknownExecution(BrokerError):
    """No execution has this id, or its reply is no longer stored."""

    code, status = "unknown_execution", 404


class UnknownCall(BrokerError):
    """No tool call has this id, or it ended long ago."""

    code, status = "unknown_call", 404


class UnknownTool(BrokerError):
    """The session has no tool of this name."""

    code, status = "unknown_tool", 404


class UnknownSnapshot(BrokerError):
    """The session has no snapshot of this id: it is another session's, was dropped, or its process has ended."""

    code, status = "unknown_snapshot", 404


class WrongMethod(BrokerError):
    """The path exists, but not for this method."""

    code, status = "method_not_allowed", 405


class FileMissing(BrokerError):
    """Descriptors do not get through here, as between kernels; nothing was done."""

    code, status = "file_missing", 424


class UpgradeRequired(BrokerError):
    """The path speaks frames only, after an HTTP Upgrade."""

    code, status = "upgrade_required", 426


class SessionBusy(BrokerError):
    """An execution is already running in this session."""

    code, status = "session_busy", 409


class LeaseExpired(BrokerError):
    """The answer arrived after the lease ended and another holder took over; the tool may have run."""

    code, status = "lease_expired", 409


class Fenced(BrokerError):
    """The request is of an older epoch: another client attached to the session since. It changed nothing."""

    code, status = "fenced", 409


class NameTaken(BrokerError):
    """Another session of this sandbox has that name."""

    code, status = "session_name_taken", 409


class ExecutionEnded(BrokerError):
    """A tool call came from an execution that is not the one running now."""

    code, status = "execution_ended", 409


class SessionLost(BrokerError):
    """The namespace is gone.

    Args:
        reason: ``deadline``, ``oom``, ``killed``, ``crashed(SIGNAL)``, ``exited(N)``, ``protocol``, ...
    """

    code, status = "session_lost", 410

    def __init__(self, reason: str) -> None:
        super().__init__(f"the session is lost: {reason}")
        self.reason = reason

    def to_json(self) -> dict[str, Any]:
        """Return the body of the reply, with the reason as a field of its own."""
        return {"error": {"code": self.code, "message": self.message, "reason": self.reason}}


class CallGone(BrokerError):
    """The tool call was cancelled, has expired, or ended as unknown; this answer reaches nobody."""

    code, status = "call_gone", 410


class LengthRequired(BrokerError):
    """A body without Content-Length."""

    code, status = "length_required", 411


class PayloadTooLarge(BrokerError):
    """The body exceeds what this route takes."""

    code, status = "payload_too_large", 413


class TooManySessions(BrokerError):
    """Every slot of this sandbox is taken."""

    code, status = "too_many_sessions", 429


class TooManyCalls(BrokerError):
    """Too many tool calls, or too many bytes of them, are waiting in this session."""

    code, status = "too_many_calls", 429


class TooManySnapshots(BrokerError):
    """The session has as many snapshots as it may."""

    code, status = "too_many_snapshots", 429


class TooManyForks(BrokerError):
    """As many sessions and snapshots come from one session as may."""

    code, status = "too_many_forks", 429


class InternalError(BrokerError):
    """A defect of the broker; the sandbox's log has the traceback."""

    code, status = "internal_error", 500


class SessionStartFailed(BrokerError):
    """The worker process could not be started."""

    code, status = "session_start_failed", 503


class ForkFailed(BrokerError):
    """The worker process could not be forked; the session is as it was."""

    code, status = "fork_failed", 503
