"""``rlm-sandbox calls``: the journal for people, and as JSON for programs."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from host_client.journal import DONE, FAILED, MEMORY, CallRecord, SqliteJournal, default_path
from host_client.settings import SandboxSettings

HEADINGS = ("TIME", "SANDBOX", "SESSION", "TOOL", "STATE", "ATTEMPT", "DURATION")

#: Wider names would push the rest off the screen.
_MAX_CELL_CHARS = 32


def calls(settings: SandboxSettings, *, limit: int, as_json: bool) -> int:
    """Print the newest tool calls, oldest first.

    Args:
        settings: Say where the journal is.
        limit: At most so many.
        as_json: One JSON object for each call and line, instead of a table.

    Raises:
        JournalNewer, JournalUnusable: The journal cannot be read.
    """
    path = settings.journal or str(default_path())
    records = [] if path == MEMORY or not Path(path).exists() else _read(path, limit)
    if as_json:
        for record in records:
            print(json.dumps(as_dict(record)))
    elif records:
        print("\n".join(table([HEADINGS, *(cells(record) for record in records)])))
    else:
        print(f"no tool call is recorded in {path}")
    return 0


def as_dict(record: CallRecord) -> dict[str, Any]:
    """Return a record as it is printed for programs; results are not shown."""
    return {
        "time": _moment(record).isoformat(timespec="milliseconds"),
        "sandbox": record.sandbox,
        "sandbox_id": record.sandbox_id,
        "session_id": record.session_id,
        "execution_id": record.execution_id,
        "call_id": record.call_id,
        "tool": record.tool,
        "state": record.state,
        "delivered": record.delivered,
        "attempt": record.attempt,
        "duration_s": record.duration_s,
    }


def cells(record: CallRecord) -> tuple[str, ...]:
    """Return a record as the texts of its row; what came from a sandbox is shown without control characters."""
    state = record.state
    if state in (DONE, FAILED) and not record.delivered:
        state = f"{state}, not delivered"
    duration = "-" if record.duration_s is None else f"{record.duration_s * 1000:.1f} ms"
    texts = (record.sandbox, record.session_id, record.tool)
    return (
        f"{_moment(record):%Y-%m-%d %H:%M:%S}",
        *(_plain(text) for text in texts),
        state,
        str(record.attempt),
        duration,
    )


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lay rows out in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _read(path: str, limit: int) -> list[CallRecord]:
    journal = SqliteJournal(path)
    try:
        return journal.calls(limit)
    finally:
        journal.close()


def _moment(record: CallRecord) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(record.started_at, datetime.timezone.utc).astimezone()


def _plain(text: str) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= _MAX_CELL_CHARS else shown[: _MAX_CELL_CHARS - 3] + "..."
