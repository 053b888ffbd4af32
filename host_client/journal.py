"""The journal: the host's durable record of tool calls. What it knows decides what may run again after a crash.

Why it is as it is: ``docs/decisions/011-the-journal.md``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from host_client.batches import Batches
from host_client.errors import CallGone, Fenced, JournalNewer, JournalUnusable, SandboxError

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
#: In the place of a path: ``memory_journal``.
MEMORY = ":memory:"

#: Records older than this are of no use to anybody: no session lives so long without a host.
MAX_AGE_S = 7 * 86_400.0
#: Results kept for a successor, all together; the oldest go first.
MAX_BYTES = 256 << 20
#: A result larger than this is not kept: after a crash its call ends as unknown.
MAX_OUTCOME_BYTES = 16 << 20
MAX_CALLS = 50_000
MAX_SESSIONS = 50_000
#: Commits between two prunings.
_PRUNE_EVERY = 1_000
#: How long another process may hold the file.
_BUSY_S = 10.0

STARTED, DONE, FAILED, UNKNOWN, REQUEUED = "started", "done", "failed", "unknown", "requeued"

_SCHEMA = """
CREATE TABLE sessions (
    sandbox_id TEXT NOT NULL, session_id TEXT NOT NULL, epoch INTEGER NOT NULL, complete INTEGER NOT NULL,
    held_at REAL NOT NULL,
    PRIMARY KEY (sandbox_id, session_id)
) WITHOUT ROWID;
CREATE TABLE calls (
    sandbox_id TEXT NOT NULL, call_id TEXT NOT NULL, attempt INTEGER NOT NULL, session_id TEXT NOT NULL,
    sandbox TEXT NOT NULL, execution_id TEXT NOT NULL, tool TEXT NOT NULL, state TEXT NOT NULL,
    delivered INTEGER NOT NULL DEFAULT 0, started_at REAL NOT NULL, duration_s REAL, outcome BLOB,
    PRIMARY KEY (sandbox_id, call_id, attempt)
) WITHOUT ROWID;
CREATE INDEX calls_by_time ON calls (started_at);
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """One client's turn at one session.

    Attributes:
        sandbox_id: The provider's id. Ids of sessions and calls come from a broker, and count within its sandbox only.
        session_id: The session.
        epoch: Counts the clients that have held it.
        sandbox: The sandbox's name, for people.
    """

    sandbox_id: str
    session_id: str
    epoch: int
    sandbox: str = ""


class CallKey(NamedTuple):
    """One attempt at one call."""

    sandbox_id: str
    call_id: str
    attempt: int


@dataclasses.dataclass(slots=True, kw_only=True)
class CallRecord:
    """What the journal knows of one attempt at a tool call.

    Attributes:
        sandbox_id: The provider's id of the sandbox.
        call_id: The broker's, also the idempotency key.
        attempt: 1-based claim count.
        session_id: The session.
        sandbox: Name of its sandbox, for people.
        execution_id: The execution that made the call.
        tool: Name of the tool.
        state: ``started``, ``done``, ``failed``, or as a successor resolved it: ``unknown``, ``requeued``.
        delivered: Whether the broker is known to have the outcome.
        started_at: Wall-clock time, for people.
        duration_s: How long the tool ran, or None.
        outcome: The result as it is posted, or None where it was delivered, too large, or there is none.
    """

    sandbox_id: str
    call_id: str
    attempt: int
    session_id: str
    sandbox: str
    execution_id: str
    tool: str
    state: str = STARTED
    delivered: bool = False
    started_at: float = 0.0
    duration_s: float | None = None
    outcome: bytes | None = None

    @property
    def key(self) -> CallKey:
        """What it is found by."""
        return CallKey(self.sandbox_id, self.call_id, self.attempt)

    def copy(self) -> CallRecord:
        """Return another record of the same; made twice for each call, so not by the slow ``dataclasses.replace``."""
        return CallRecord(
            sandbox_id=self.sandbox_id,
            call_id=self.call_id,
            attempt=self.attempt,
            session_id=self.session_id,
            sandbox=self.sandbox,
            execution_id=self.execution_id,
            tool=self.tool,
            state=self.state,
            delivered=self.delivered,
            started_at=self.started_at,
            duration_s=self.duration_s,
            outcome=self.outcome,
        )


class Journal(Protocol):
    """Records tool calls. Implementations are safe to share between threads.

    Every method raises ``JournalUnusable`` where the record cannot be made; nothing that it was to permit may happen.
    """

    def hold(self, holder: Holder) -> bool:
        """Note that a client holds a session now; older ones can record nothing in it any more.

        Returns:
            Whether every earlier holder used this journal: then a call that it does not know of never started.
        """

    def intend(self, holder: Holder, call: CallRecord) -> None:
        """Record durably that a tool is about to start.

        Raises:
            Fenced: The holder was replaced: the tool must not start.
            CallGone: This call has started before, and nobody has said that it may start again.
        """

    def conclude(self, call: CallRecord) -> None:
        """Record how a tool ended, before anybody else is told.

        It outlasts the process at once, and the machine from the next flush on: a session that could still want it
        ends together with its machine. After a crash of a machine whose sandboxes are elsewhere, the call has started.

        Args:
            call: With state, duration and outcome.
        """

    def delivered(self, call: CallKey) -> None:
        """Note, some time soon, that the broker has the outcome: its bytes need not be kept."""

    def resolve(self, call: CallKey, state: str) -> None:
        """Note what a successor made of a call: ``unknown`` or ``requeued``."""

    def find(self, call: CallKey) -> CallRecord | None:
        """Return what is known of an attempt."""

    def calls(self, limit: int) -> list[CallRecord]:
        """Return the newest records, oldest first, without their outcomes."""

    def close(self) -> None:
        """Write what is left to write. Idempotent; the journal may be used again."""


class _Change(NamedTuple):
    """One thing to write inside the transaction; it refuses by raising, before it has written anything."""

    write: Callable[[sqlite3.Connection], Any]
    durable: bool


class _Ticket:
    """A change on its way, and what came of it."""

    __slots__ = ("change", "error", "result", "settled")

    def __init__(self, change: _Change) -> None:
        self.change = change
        self.settled = False
        self.result: Any = None
        self.error: Exception | None = None


class SqliteJournal:
    """A ``Journal`` in one SQLite file, which processes may share.

    Changes that arrive while another one is written to the disk are written together with the next flush.

    Args:
        path: The file.
        clock: Wall-clock seconds.

    Raises:
        JournalNewer: The file was written by a newer version of this package.
        JournalUnusable: It cannot be opened, written to, or understood.
    """

    def __init__(self, path: Path | str, *, clock: Callable[[], float] = time.time) -> None:
        self.path = str(path)
        self._clock = clock
        self._batches = Batches(self._commit)
        # Guards _done_with.
        self._lock = threading.Lock()
        self._done_with: list[CallKey] = []
        # Held by whoever uses the connection. Guards _connection, _pid, _commits and _flushes.
        self._writing = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = os.getpid()
        # Not at each start, which would read all that is kept: somewhere in the next commits, of any process.
        self._commits = random.randrange(_PRUNE_EVERY)  # noqa: S311
        self._flushes = True
        with self._writing, self._explained():
            self._open()

    def hold(self, holder: Holder) -> bool:
        """See ``Journal.hold``."""
        who = (holder.sandbox_id, holder.session_id)

        def write(db: sqlite3.Connection) -> bool:
            found = db.execute("SELECT epoch, complete FROM sessions WHERE sandbox_id = ? AND session_id = ?", who)
            epoch, complete = found.fetchone() or (0, holder.epoch == 1)
            if epoch >= holder.epoch:
                raise Fenced(f"epoch {holder.epoch} of the session {holder.session_id} is over", status=409)
            complete = bool(complete) and epoch == holder.epoch - 1
            db.execute(
                "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?)",
                (*who, holder.epoch, complete, self._clock()),
            )
            return complete

        # The first holder replaces nobody: were its line lost with the machine, calls would only count as unknown.
        return bool(self._write(write, durable=holder.epoch > 1))

    def intend(self, holder: Holder, call: CallRecord) -> None:
        """See ``Journal.intend``."""

        def write(db: sqlite3.Connection) -> None:
            who = (holder.sandbox_id, holder.session_id, call.sandbox_id, call.call_id)
            epoch, earlier = db.execute(_HOLDER_AND_EARLIER, who).fetchone()
            if epoch is not None and epoch != holder.epoch:
                raise Fenced(f"epoch {holder.epoch} of the session {holder.session_id} is over", status=409)
            if earlier is not None:
                raise CallGone(f"the call {call.call_id} was started before ({earlier})", status=410)
            self._insert(db, call)

        self._write(write, durable=True)

    def conclude(self, call: CallRecord) -> None:
        """See ``Journal.conclude``."""
        if call.outcome is not None and len(call.outcome) > MAX_OUTCOME_BYTES:
            call = dataclasses.replace(call, outcome=None)
        self._write(lambda db: self._insert(db, call), durable=False)

    def delivered(self, call: CallKey) -> None:
        """See ``Journal.delivered``: written together with the next change, at the latest by ``close``."""
        with self._lock:
            self._done_with.append(call)

    def resolve(self, call: CallKey, state: str) -> None:
        """See ``Journal.resolve``."""
        change = f"UPDATE calls SET state = ? WHERE {_THIS_CALL}"  # noqa: S608
        self._write(lambda db: db.execute(change, (state, *call)), durable=True)

    def find(self, call: CallKey) -> CallRecord | None:
        """See ``Journal.find``."""
        query = f"SELECT {_COLUMNS}, outcome FROM calls WHERE {_THIS_CALL}"  # noqa: S608
        with self._writing, self._explained():
            row = self._open().execute(query, call).fetchone()
        return None if row is None else _record(row)

    def calls(self, limit: int) -> list[CallRecord]:
        """See ``Journal.calls``."""
        query = f"SELECT {_COLUMNS}, NULL FROM calls ORDER BY started_at DESC, call_id DESC LIMIT ?"  # noqa: S608
        with self._writing, self._explained():
            rows = self._open().execute(query, (limit,)).fetchall()
        return [_record(row) for row in reversed(rows)]

    def prune(self) -> None:
        """Forget what is old, or more than is kept; happens by itself, once in a thousand commits."""
        with self._writing, self._explained():
            self._prune()

    def close(self) -> None:
        """See ``Journal.close``."""
        if self._connection is None or self._pid != os.getpid():
            return
        # Not within the lock: another thread may be about to write this together with its own.
        with contextlib.suppress(JournalUnusable):
            self._write(lambda db: None, durable=False)
        with self._writing:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
                self._connection = None

    def _write(self, write: Callable[[sqlite3.Connection], Any], *, durable: bool) -> Any:
        ticket = _Ticket(_Change(write, durable))
        self._batches.join(ticket)
        if ticket.error is not None:
            raise ticket.error
        if not ticket.settled:  # whoever had it in hand may be interrupted at any instruction
            raise JournalUnusable("writing the journal was cut short")
        return ticket.result

    def _commit(self, batch: list[_Ticket]) -> None:
        with self._writing:
            with self._lock:
                done_with, self._done_with = self._done_with, []
            self._commit_now(batch, done_with)

    def _commit_now(self, batch: list[_Ticket], done_with: list[CallKey]) -> None:
        try:
            with self._explained():
                db = self._open()
                self._flush_commits(db, any(ticket.change.durable for ticket in batch))
                with _transaction(db):
                    for ticket in batch:
                        try:
                            ticket.result = ticket.change.write(db)
                        except (Fenced, CallGone) as refused:
                            ticket.error = refused
                    if done_with:
                        change = f"UPDATE calls SET delivered = 1, outcome = NULL WHERE {_THIS_CALL}"  # noqa: S608
                        db.executemany(change, done_with)
                self._commits += 1
                if self._commits % _PRUNE_EVERY == 0:
                    self._prune()
            for ticket in batch:
                ticket.settled = True
        except BaseException as error:  # also Ctrl-C: what is not known to be written counts as not written
            for ticket in batch:
                ticket.error = _same(error)
            with self._lock:
                self._done_with = done_with + self._done_with
            if not isinstance(error, (JournalUnusable, JournalNewer)):
                raise

    def _flush_commits(self, db: sqlite3.Connection, durable: bool) -> None:
        """Choose whether the next commit reaches the disk, or the file only."""
        if durable != self._flushes:
            db.execute("PRAGMA synchronous=FULL" if durable else "PRAGMA synchronous=NORMAL")
            self._flushes = durable

    def _insert(self, db: sqlite3.Connection, call: CallRecord) -> None:
        db.execute(
            "INSERT OR REPLACE INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(*call.key, call.session_id, call.sandbox, call.execution_id, call.tool),
                *(call.state, call.delivered, call.started_at, call.duration_s, call.outcome),
            ),
        )

    def _prune(self) -> None:
        """Forget what is old or too much. Where a call's beginning is forgotten, its session counts as incomplete."""
        db = self._open()
        with _transaction(db):
            old = self._clock() - MAX_AGE_S
            # Not by age: while a row is there, a clock that was set cannot let an older holder in again.
            oldest = "SELECT held_at FROM sessions ORDER BY held_at DESC LIMIT 1 OFFSET ?"
            db.execute(f"DELETE FROM sessions WHERE held_at <= ({oldest})", (MAX_SESSIONS,))  # noqa: S608
            count = db.execute("SELECT count(*) FROM calls").fetchone()[0]
            if count > MAX_CALLS:
                row = "SELECT started_at FROM calls ORDER BY started_at DESC LIMIT 1 OFFSET ?"
                old = max(old, db.execute(row, (MAX_CALLS,)).fetchone()[0])
            db.execute(
                "UPDATE sessions SET complete = 0 "
                "WHERE session_id IN (SELECT session_id FROM calls WHERE started_at <= ?)",
                (old,),
            )
            db.execute("DELETE FROM calls WHERE started_at <= ?", (old,))
            # A result that goes leaves its call as done without a result: unknown to a successor, never run again.
            held = "SELECT sandbox_id, call_id, attempt, length(outcome) FROM calls WHERE outcome IS NOT NULL"
            kept_bytes = 0
            for *call, size in db.execute(f"{held} ORDER BY started_at DESC").fetchall():
                kept_bytes += size
                if kept_bytes > MAX_BYTES:
                    db.execute(f"UPDATE calls SET outcome = NULL WHERE {_THIS_CALL}", call)  # noqa: S608
        db.execute("PRAGMA incremental_vacuum")

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._pid == os.getpid():
            return self._connection
        # After a fork the connection is the parent's: it is left alone, and a new one opened.
        _make_folder(self.path)
        db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(db)
        except BaseException:
            db.close()
            raise
        self._connection, self._pid, self._flushes = db, os.getpid(), True
        return db

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise _explain(self.path, error) from error


def default_path(environ: Mapping[str, str] | None = None) -> Path:
    """Return where this user's journal is: under ``$XDG_STATE_HOME``, else ``~/.local/state``."""
    environ = os.environ if environ is None else environ
    state = environ.get("XDG_STATE_HOME") or ""
    folder = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    return folder / "rlm-sandbox" / "journal.sqlite3"


_COLUMNS = (
    "sandbox_id, call_id, attempt, session_id, sandbox, execution_id, tool, state, delivered, started_at, duration_s"
)
_HOLDER_AND_EARLIER = (
    "SELECT (SELECT epoch FROM sessions WHERE sandbox_id = ? AND session_id = ?), "
    "(SELECT state FROM calls WHERE sandbox_id = ? AND call_id = ? AND state != 'requeued' LIMIT 1)"
)
_THIS_CALL = "sandbox_id = ? AND call_id = ? AND attempt = ?"


def _record(row: tuple[Any, ...]) -> CallRecord:
    names = [field.name for field in dataclasses.fields(CallRecord)]
    values = dict(zip(names, row, strict=True))
    return CallRecord(**{**values, "delivered": bool(values["delivered"])})


class _transaction:  # not a generator: there are two for each tool call
    """Writes all or nothing."""

    __slots__ = ("_db",)

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            try:
                self._db.execute("COMMIT")
                return
            except BaseException:
                self._roll_back()
                raise
        self._roll_back()

    def _roll_back(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # SQLite rolls back by itself where the disk is full
            self._db.execute("ROLLBACK")


def _prepare(db: sqlite3.Connection) -> None:
    """Make the tables where there are none, and prove that the file can be written to."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise JournalNewer(
            f"the journal is of version {version}, this package reads up to {SCHEMA_VERSION}",
            help="update rlm-sandbox, or set RLM_SANDBOX_JOURNAL to another file",
        )
    if version == 0:
        db.execute("PRAGMA auto_vacuum=INCREMENTAL")
    _write_ahead(db)
    db.execute("PRAGMA synchronous=FULL")
    db.execute(f"PRAGMA journal_size_limit={MAX_OUTCOME_BYTES}")
    with _transaction(db):
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:  # again, now that nobody else writes
            for statement in filter(str.strip, _SCHEMA.split(";")):
                db.execute(statement)
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def _write_ahead(db: sqlite3.Connection) -> None:
    """Turn write-ahead logging on: SQLite's own time-out does not cover two that do so to a new file at once."""
    give_up_at = time.monotonic() + _BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up_at:
                raise
            time.sleep(0.005)


def _make_folder(path: str) -> None:
    folder = Path(path).parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Results of tools are nobody else's business. SQLite gives its side files the mode of the main one.
    # Only where there is none: closing a file that SQLite has open elsewhere in this process would drop its locks.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))


def _same(error: BaseException) -> SandboxError:
    """Return a copy of an error for one of those that it struck."""
    if isinstance(error, (JournalUnusable, JournalNewer)):
        return type(error)(error.message, help=error.help)
    return JournalUnusable(f"writing the journal was cut short: {type(error).__name__}")


def _explain(path: str, error: Exception) -> JournalUnusable:
    text = str(error.strerror if isinstance(error, OSError) else error)
    lower = text.lower()
    if "full" in lower or "no space" in lower or "quota" in lower:
        what, help = "the disk is full", f"make room: df -h {Path(path).parent}"
    elif any(word in lower for word in ("readonly", "read-only", "permission", "unable to open")):
        what, help = "it cannot be written to", f"is {Path(path).parent} yours, and mounted for writing?"
    elif "locked" in lower:
        what, help = "another process holds it", "is one of yours stopped? Let it go on, or kill it"
    elif "malformed" in lower or "not a database" in lower:
        what, help = "it is damaged", f"move it away: mv {path} {path}.damaged"
    else:
        what, help = text, f"look at {path}, or set RLM_SANDBOX_JOURNAL to another file"
    return JournalUnusable(f"the journal of tool calls ({path}): {what} ({text})", help=help)
