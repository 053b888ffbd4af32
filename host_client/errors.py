"""Every error of the host side.

::

    SandboxError                      root; has a stable ``code`` and, where something helps, ``help``
    ├ SetupError                      nothing was started
    │ ├ EngineUnavailable             no container engine answers
    │ ├ EnginePermission              an engine is there, this user may not use it
    │ ├ BubblewrapMissing             no bubblewrap, where sandboxes are to be made with it
    │ ├ ImageMissing                  the image was never built, or is of another version
    │ ├ ImageBuildFailed
    │ ├ DiskFull
    │ ├ SandboxTooWeak                it came out weaker than asked for, and was thrown away
    │ ├ PreloadFailed                 a module of the setting ``preload`` cannot be imported in the sandbox
    │ ├ BadSetting                    a setting, tool, output field or variable that cannot work
    │ ├ JournalNewer                  the journal of tool calls was written by a newer version of this package
    │ ├ UnknownSession                there is no such session to attach to, or more than one
    │ ├ ForeignSession                it is in another user's sandbox
    │ ├ UnknownRun                    the history has no such run
    │ ├ UnknownSandbox                no running sandbox has that name
    │ ├ UnknownPool                   no open pool of this process has that name
    │ └ TransportUnusable             the way to the broker that was asked for does not lead there
    ├ FileRefused                     a file or folder cannot be put into a session, or got from it; ``path`` says which
    ├ SavedSessionError               a session cannot be saved, or restored; ``path`` says where
    │ ├ SaveFailed                    nothing was written, the session is as it was
    │ ├ RestoreFailed                 the session is as it was
    │ ├ SavedFileDamaged              no saved session, or not what was saved
    │ ├ SavedFileNewer                of a newer version of this package
    │ └ SavedFileMismatch             saved with other versions of Python or packages; ``differs`` has them
    ├ JournalUnusable                 the journal cannot be written or read; a tool that needs it was not run
    ├ HistoryUnusable                 the history of runs cannot be read; writing it never fails a run
    ├ BudgetExceeded                  a run has used up its time, sub-calls, tokens or cost
    ├ ProviderError                   the engine refused or failed while a sandbox was started or stopped
    ├ ProtocolMismatch                host and image speak different versions
    ├ BrokerError                     the broker refused a request; ``status`` is the HTTP status
    │ ├ SessionBusy                   an execution is already running in this session
    │ ├ SessionNameTaken              the sandbox has a session of that name already
    │ ├ LeaseExpired                  a result came too late; somebody else holds the call
    │ ├ Fenced                        another client attached to the session; this one is out
    │ ├ CallGone                      a result came for a call that was cancelled
    │ ├ UnknownSnapshot               the snapshot is another session's, was dropped, or its process ended
    │ ├ TooManySnapshots              the session has as many snapshots as it may
    │ ├ TooManyForks                  as many sessions and snapshots come from one session as may
    │ └ ForkFailed                    no process or memory for another copy; the session is as it was
    ├ BrokerUnreachable               no answer from the broker: it died, or its socket is gone
    ├ PoolError                       a pool gave no sandbox; ``pool`` and ``session`` say which
    │ ├ PoolExhausted                 every place is taken
    │ │ ├ PoolQueueFull               and as many wait already as may
    │ │ └ PoolWaitTimeout             and none became free in time
    │ ├ PoolSessionBusy               the session's sandbox is in use
    │ ├ PoolSessionGone               the session's sandbox was ended, or died
    │ └ PoolClosed                    the pool was closed
    ├ MalformedReply                  what came from the broker breaks the protocol
    ├ HookError                       a hook around an RLM's iteration returned what it may not
    └ SessionLost                     the namespace is gone; ``reason`` says why

While DSPy is in use, what ``SandboxInterpreter`` raises is also an instance of the class that the
installed DSPy expects; see ``host_client.dspy_compat``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from broker.protocol.self_test import Check


class SandboxError(Exception):
    """Root of all errors of this package.

    Args:
        message: What happened, naming the thing it happened to.
        help: What the user can do about it, such as a command; printed on a line of its own.
    """

    code = "sandbox_error"

    def __init__(self, message: str, *, help: str | None = None) -> None:
        super().__init__(message if help is None else f"{message}\n  {help}")
        self.message = message
        self.help = help


class SetupError(SandboxError):
    """Nothing was started."""

    code = "setup_error"


class EngineUnavailable(SetupError):
    """No container engine answers."""

    code = "engine_unavailable"


class EnginePermission(SetupError):
    """An engine is there, but this user may not use it."""

    code = "engine_permission"


class BubblewrapMissing(SetupError):
    """``bwrap`` is not installed, or too old."""

    code = "bubblewrap_missing"


class ImageMissing(SetupError):
    """The image was never built, or the sources changed since."""

    code = "image_missing"


class ImageBuildFailed(SetupError):
    """The image could not be built; the message holds the end of the log."""

    code = "image_build_failed"


class DiskFull(SetupError):
    """No space left where the engine or this package writes."""

    code = "disk_full"


class SandboxTooWeak(SetupError):
    """The sandbox, or the engine under it, is weaker than asked for; nothing ran in it, and nothing is left.

    Args:
        message: Names each check that does not hold.
        checks: All of them, those that hold too.
    """

    code = "sandbox_too_weak"

    def __init__(self, message: str, *, checks: Sequence[Check], help: str | None = None) -> None:
        super().__init__(message, help=help)
        self.checks = tuple(checks)


class PreloadFailed(SetupError):
    """A module of the setting ``preload`` cannot be imported in the sandbox; nothing ran, and nothing is left."""

    code = "preload_failed"


class BadSetting(SetupError, ValueError):
    """A setting, tool, output field or variable that cannot work; nothing ran."""

    code = "bad_setting"


class JournalNewer(SetupError):
    """The journal was written by a newer version of this package; it is left as it is."""

    code = "journal_newer"


class UnknownSession(SetupError):
    """There is no such session to attach to, or more than one that could be meant."""

    code = "unknown_session"


class ForeignSession(SetupError):
    """The session is in a sandbox of another user."""

    code = "foreign_session"


class UnknownRun(SetupError):
    """The history has no run of that id, or several that begin like it."""

    code = "unknown_run"


class UnknownSandbox(SetupError):
    """No running sandbox has that name."""

    code = "unknown_sandbox"


class UnknownPool(SetupError):
    """No open pool of this process has that name."""

    code = "unknown_pool"


class FileRefused(SandboxError):
    """A file or folder cannot be put into a session, or got from it.

    Args:
        message: What is wrong with it.
        path: Which one; a path that came from a session is shown without control characters.
    """

    code = "file_refused"

    def __init__(self, message: str, *, path: str, help: str | None = None) -> None:
        shown = path if path.isprintable() else ascii(path)
        super().__init__(f"{shown[:500]}: {message}", help=help)
        self.path = path


class SavedSessionError(SandboxError):
    """A session cannot be saved to a file, or restored from one.

    Args:
        message: What is wrong.
        path: The file.
    """

    code = "saved_session_error"

    def __init__(self, message: str, *, path: str, help: str | None = None) -> None:
        shown = path if path.isprintable() else ascii(path)
        super().__init__(f"{shown[:500]}: {message}", help=help)
        self.path = path


class SaveFailed(SavedSessionError):
    """The session was not saved: no file was written, and the session is as it was."""

    code = "save_failed"


class RestoreFailed(SavedSessionError):
    """The session was not restored, and is as it was."""

    code = "restore_failed"


class SavedFileDamaged(SavedSessionError):
    """The file is no saved session, or was cut off or changed since; nothing was restored."""

    code = "saved_file_damaged"


class SavedFileNewer(SavedSessionError):
    """The file was written by a newer version of this package; nothing was restored."""

    code = "saved_file_newer"


class SavedFileMismatch(SavedSessionError):
    """The session was saved with another Python, or other versions of packages that it needs; nothing was restored.

    Args:
        message: Names what differs.
        path: The file.
        differs: By name, the version in the file and the one of the sandbox (empty where it has none).
    """

    code = "saved_file_mismatch"

    def __init__(
        self, message: str, *, path: str, differs: Mapping[str, tuple[str, str]], help: str | None = None
    ) -> None:
        super().__init__(message, path=path, help=help)
        self.differs = dict(differs)


class TransportUnusable(SetupError):
    """The way to the broker that was asked for does not lead there: the socket is not shared, or no relay can run."""

    code = "transport_unusable"


class ProviderError(SandboxError):
    """The engine refused or failed while a sandbox was started or stopped."""

    code = "provider_error"


class ProtocolMismatch(SandboxError):
    """Host and image speak different versions of the protocol."""

    code = "protocol_mismatch"


class BrokerError(SandboxError):
    """The broker refused a request.

    Args:
        message: The broker's text.
        status: HTTP status of its reply.
    """

    code = "broker_error"

    def __init__(self, message: str, *, status: int = 500, help: str | None = None) -> None:
        super().__init__(message, help=help)
        self.status = status


class SessionBusy(BrokerError):
    """An execution is already running in this session."""

    code = "session_busy"


class SessionNameTaken(BrokerError):
    """The sandbox has a living session of that name already; the message says who holds it."""

    code = "session_name_taken"


class LeaseExpired(BrokerError):
    """The result arrived after the lease ended and another holder took over; the tool may have run."""

    code = "lease_expired"


class Fenced(BrokerError):
    """Another client attached to the session; what this one asked for was not done."""

    code = "fenced"


class CallGone(BrokerError):
    """The result arrived for a call that was cancelled or has expired."""

    code = "call_gone"


class UnknownSnapshot(BrokerError):
    """The snapshot is another session's, was dropped, or its process has ended; the session is as it was."""

    code = "unknown_snapshot"


class TooManySnapshots(BrokerError):
    """The session has as many snapshots as it may; ``drop()`` some."""

    code = "too_many_snapshots"


class TooManyForks(BrokerError):
    """As many sessions and snapshots come from one session as may; shut some down, or drop them."""

    code = "too_many_forks"


class ForkFailed(BrokerError):
    """The session's process could not be forked, for lack of processes or memory; the session is as it was."""

    code = "fork_failed"


class JournalUnusable(SandboxError):
    """The journal of tool calls cannot be written or read: disk full, read-only, damaged.

    A tool that was not declared idempotent does not run then; one that had just ended counts as unknown.
    """

    code = "journal_unusable"


class HistoryUnusable(SandboxError):
    """The history of runs cannot be read: it is damaged, somebody else's, or of a newer version."""

    code = "history_unusable"


class BudgetExceeded(SandboxError):
    """A run has used up one of its budgets, or asked for more than is left of it.

    Args:
        message: Names the budget, the limit and what was spent.
        budget: ``max_seconds``, ``max_calls``, ``max_tokens`` or ``max_cost``.
        limit: What was allowed.
        spent: What was spent when this was noticed.
    """

    code = "budget_exceeded"

    def __init__(
        self, message: str, *, budget: str = "", limit: float = 0, spent: float = 0, help: str | None = None
    ) -> None:
        super().__init__(message, help=help)
        self.budget, self.limit, self.spent = budget, limit, spent


class BrokerUnreachable(SandboxError):
    """No answer from the broker: it died, or its socket is gone."""

    code = "broker_unreachable"


class PoolError(SandboxError):
    """A pool gave no sandbox.

    Args:
        message: Names pool, session and, where that matters, who holds the places.
        pool: The pool's name.
        session: The named session that was asked for, or None.
    """

    code = "pool_error"

    def __init__(self, message: str, *, pool: str, session: str | None = None, help: str | None = None) -> None:
        super().__init__(message, help=help)
        self.pool = pool
        self.session = session


class PoolExhausted(PoolError):
    """Every place of the pool is taken."""

    code = "pool_exhausted"


class PoolQueueFull(PoolExhausted):
    """Every place is taken, and as many wait for one as may."""

    code = "pool_queue_full"


class PoolWaitTimeout(PoolExhausted):
    """Every place is taken, and none became free in time."""

    code = "pool_wait_timeout"


class PoolSessionBusy(PoolError):
    """The session's sandbox is in use; with strict affinity no other one will do."""

    code = "pool_session_busy"


class PoolSessionGone(PoolError):
    """The session's sandbox was ended or died, and its variables with it; strict affinity does not start over."""

    code = "pool_session_gone"


class PoolClosed(PoolError):
    """The pool was closed."""

    code = "pool_closed"


class MalformedReply(SandboxError):
    """What came from the broker breaks the protocol; the sandbox is not asked again."""

    code = "malformed_reply"


class HookError(SandboxError):
    """A hook around an RLM's iteration returned what it may not, or code that fails; the message names the hook."""

    code = "hook_error"


class SessionLost(SandboxError):
    """The session's namespace is gone and this interpreter cannot go on.

    Args:
        message: What happened.
        reason: ``deadline``, ``interrupted``, ``output_limit``, ``oom``, ``killed``, ``crashed(SIGNAL)``,
            ``exited(N)``, ``removed``, ``engine_gone``, ``unresponsive`` (the broker no longer answers), ``protocol``,
            ``fenced`` (another client attached to the session: there it goes on), ``expired`` (it was idle for longer
            than its time to live) or ``shutdown``.
    """

    code = "session_lost"

    def __init__(self, message: str, *, reason: str, help: str | None = None) -> None:
        super().__init__(message, help=help)
        self.reason = reason
