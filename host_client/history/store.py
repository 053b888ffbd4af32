"""The history's file: its tables, what is kept of it, and reading it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from host_client.errors import HistoryUnusable, UnknownRun
from host_client.history.records import CallRow, ExecutionRow, IterationRow, Row, RunRow, WholeRun
from host_client.history.texts import Mask, as_json, clipped, size_of
from host_client.journal import default_path as journal_path

SCHEMA_VERSION = 1

MAX_AGE_S = 30 * 86_400.0
#: All of the file; the oldest runs go first.
MAX_BYTES = 256 << 20
#: How long another process may hold the file; only the background waits.
_BUSY_S = 5.0

_TABLES: dict[type[Any], str] = {
    RunRow: "runs",
    IterationRow: "iterations",
    ExecutionRow: "executions",
    CallRow: "calls",
}
_COLUMNS = {kind: tuple(field.name for field in dataclasses.fields(kind)) for kind in _TABLES}
#: Kept as JSON; every other text as it is.
_JSON = frozenset({"inputs", "outputs", "prompt", "answer"})
_INDICES = (
    "CREATE INDEX runs_by_time ON runs (started_at)",
    "CREATE INDEX runs_by_parent ON runs (parent_id)",
)

Kind = TypeVar("Kind", RunRow, IterationRow, ExecutionRow, CallRow)


def default_path(environ: Mapping[str, str] | None = None) -> Path:
    """Return where this user's history is: beside the journal."""
    return journal_path(environ).with_name("history.sqlite3")


def path_of(setting: bool | str) -> str | None:
    """Return the file that the setting ``history`` means, or None where nothing is recorded."""
    if isinstance(setting, str):
        return setting
    return str(default_path()) if setting else None


class History:
    """Reads the history.

    Args:
        path: The file; by default this user's.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = str(default_path() if path is None else path)

    def runs(self, limit: int = 100) -> list[RunRow]:
        """Return the newest runs, oldest first.

        Raises:
            HistoryUnusable: The file cannot be read.
        """
        with self._opened() as db:
            found = [] if db is None else _read(db, RunRow, "ORDER BY started_at DESC, id DESC LIMIT ?", (limit,))
        return found[::-1]

    def find(self, run_id: str) -> WholeRun:
        """Return a run with all that is known of it.

        Args:
            run_id: Its id, or the beginning of it where no other begins so.

        Raises:
            UnknownRun: There is no such run, or several begin like that.
            HistoryUnusable: The file cannot be read.
        """
        with self._opened() as db:
            run = self._find(db, run_id)
            assert db is not None
            of_run = ("WHERE run_id = ? ORDER BY number", (run.id,))
            return WholeRun(
                run=run,
                iterations=tuple(_read(db, IterationRow, *of_run)),
                executions=tuple(_read(db, ExecutionRow, *of_run)),
                calls=tuple(_read(db, CallRow, *of_run)),
                nested=tuple(_read(db, RunRow, "WHERE parent_id = ? ORDER BY started_at, id", (run.id,))),
            )

    def prompts(self, run_id: str) -> list[CallRow]:
        """Return the calls of models of a run, with their messages and answers.

        Raises:
            As ``find``.
        """
        return [call for call in self.find(run_id).calls if call.kind == "model"]

    def _find(self, db: sqlite3.Connection | None, run_id: str) -> RunRow:
        pattern = "".join(f"\\{char}" if char in "%_\\" else char for char in run_id) + "%"
        found = [] if db is None or not run_id else _read(db, RunRow, "WHERE id LIKE ? ESCAPE '\\' LIMIT 3", (pattern,))
        exact = [run for run in found if run.id == run_id] or found
        if len(exact) == 1:
            return exact[0]
        several = f"several runs begin with {run_id!r:.80}: {', '.join(run.id for run in found)}"
        raise UnknownRun(
            several if found else f"there is no run {run_id!r:.80} in {self.path}",
            help="rlm-sandbox history lists them",
        )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection | None]:
        """Give a connection, or None where nothing was ever recorded."""
        from host_client.history.writer import flush

        flush(self.path)
        if not Path(self.path).exists():
            yield None
            return
        try:
            with contextlib.closing(connect(self.path)) as db:
                yield db
        except (sqlite3.Error, OSError) as error:
            raise HistoryUnusable(
                f"the history of runs ({self.path}) cannot be read: {error}",
                help=f"move it away: mv {self.path} {self.path}.damaged",
            ) from error


def connect(path: str) -> sqlite3.Connection:
    """Open the file and make its tables where there are none.

    Raises:
        sqlite3.Error, OSError: It cannot be opened or written to.
        HistoryUnusable: It is of a newer version.
    """
    Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Prompts and outputs are nobody else's business; SQLite gives its side files the mode of the main one.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        _prepare(db)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise HistoryUnusable(
            f"the history is of version {version}, this package reads up to {SCHEMA_VERSION}",
            help="update rlm-sandbox, or set RLM_SANDBOX_HISTORY to another file",
        )
    if version == 0:
        db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        db.execute("PRAGMA journal_mode=WAL")
        with transaction(db):
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:  # again, now that nobody else writes
                for statement in (*map(_table, _TABLES), *_INDICES):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    # A history that loses its last moments in a power cut is whole all the same.
    db.execute("PRAGMA synchronous=NORMAL")
    db.execute("PRAGMA journal_size_limit=16777216")


def _table(kind: type[Any]) -> str:
    names = _COLUMNS[kind]
    key = "id" if kind is RunRow else "run_id, number"
    return f"CREATE TABLE {_TABLES[kind]} ({', '.join(names)}, PRIMARY KEY ({key})) WITHOUT ROWID"


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Write all of a block, or none of it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def write(db: sqlite3.Connection, rows: Iterable[tuple[Row, Mask]]) -> None:
    """Write rows, each masked; a row that is there already is replaced."""
    # By kind, and each kind in one statement: a run may make thousands of calls, and it is the run's process.
    by_kind: dict[type[Any], list[list[Any]]] = {}
    for row, mask in rows:
        values = [_stored(name, getattr(row, name), mask) for name in _COLUMNS[type(row)]]
        by_kind.setdefault(type(row), []).append(values)
    with transaction(db):
        for kind, of_kind in by_kind.items():
            marks = ", ".join("?" * len(_COLUMNS[kind]))
            db.executemany(f"INSERT OR REPLACE INTO {_TABLES[kind]} VALUES ({marks})", of_kind)  # noqa: S608


def prune(
    db: sqlite3.Connection,
    *,
    clock: Callable[[], float] = time.time,
    max_age_s: float = MAX_AGE_S,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Forget runs that are too old, and the oldest while the file is too large."""
    with transaction(db):
        _forget(db, "started_at < ?", (clock() - max_age_s,))
        while _size(db) > max_bytes:
            # Some at a time: how much room a run takes is known once it is gone.
            eldest = db.execute("SELECT started_at FROM runs ORDER BY started_at LIMIT 1 OFFSET 9").fetchone()
            if not _forget(db, "started_at <= ?", eldest or (clock(),)):
                break
    db.execute("PRAGMA incremental_vacuum")


def _forget(db: sqlite3.Connection, which: str, values: tuple[Any, ...]) -> int:
    for table in ("iterations", "executions", "calls"):
        db.execute(f"DELETE FROM {table} WHERE run_id IN (SELECT id FROM runs WHERE {which})", values)  # noqa: S608
    return db.execute(f"DELETE FROM runs WHERE {which}", values).rowcount  # noqa: S608


def _size(db: sqlite3.Connection) -> int:
    pages, free, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _stored(column: str, value: Any, mask: Mask) -> Any:
    if column == "answer_chars":
        return size_of(value)
    if value is None or isinstance(value, (int, float)):
        return value
    if column in _JSON:
        try:
            return as_json(value, mask)
        except Exception as error:  # an object of the user's, with methods of its own
            return f'"<unreadable: {type(error).__name__}>"'
    return clipped(mask(str(value)))


def _read(db: sqlite3.Connection, kind: type[Kind], rest: str, values: tuple[Any, ...]) -> list[Kind]:
    names = _COLUMNS[kind]
    query = f"SELECT {', '.join(names)} FROM {_TABLES[kind]} {rest}"  # noqa: S608
    rows = [dict(zip(names, row, strict=True)) for row in db.execute(query, values)]
    for row in rows:
        if "cached" in row:
            row["cached"] = bool(row["cached"])
    return [kind(**row) for row in rows]
