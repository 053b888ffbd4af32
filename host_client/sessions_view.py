"""``rlm-sandbox sessions``: the sessions for people, and as JSON for programs. All text is made safe for a terminal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence

from host_client.demo.shorten import one_line
from host_client.sessions import SessionStatus, close_session, list_sessions
from host_client.settings import SandboxSettings
from host_client.status_table import ago, size

HEADINGS = ("NAME", "SANDBOX", "STATE", "AGE", "IDLE", "ENDS IN", "RUNS", "MEMORY", "HELD BY")

#: On a narrow terminal these columns give way, the widest first, down to so many characters.
_LEAST = {0: 10, 1: 8, 2: 12, 8: 12}
_MIN_WIDTH = 60


def show_sessions(settings: SandboxSettings, sandbox: str | None, *, as_json: bool) -> int:
    """Print the sessions of one sandbox, or of all.

    Raises:
        UnknownSandbox, SandboxError: As ``list_sessions``.
    """
    found = list_sessions(sandbox, settings=settings)
    if as_json:
        for each in found:
            print(json.dumps(each.to_json()))
    elif found:
        print("\n".join(table(found, shutil.get_terminal_size().columns)))
    else:
        print("no session is open" if sandbox is None else f"no session is open in the sandbox {sandbox!r}")
        print('to open one that stays: SandboxInterpreter.create("NAME", sandbox="default")')
    return 0


def close_one(settings: SandboxSettings, name: str, sandbox: str | None, *, force: bool) -> int:
    """Close a session and say what it was.

    Raises:
        SandboxError: As ``close_session``.
    """
    closed = close_session(name, sandbox=sandbox, force=force, settings=settings)
    runs = "1 execution" if closed.executions == 1 else f"{closed.executions:,} executions"
    print(f"closed {one_line(_address(closed), 160)}: {closed.state}, {runs}, {ago(closed.age_s)} old")
    return 0


def table(sessions: Sequence[SessionStatus], width: int) -> list[str]:
    """Lay sessions out in columns that fit a width in characters."""
    rows = [HEADINGS, *(_cells(each) for each in sessions)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    gap = " " if width < 100 else "  "
    surplus = sum(widths) + len(gap) * (len(widths) - 1) - max(width, _MIN_WIDTH)
    for _ in range(surplus):
        widest = max(_LEAST, key=lambda column: widths[column] - _LEAST[column])
        if widths[widest] <= _LEAST[widest]:
            break
        widths[widest] -= 1
    return [
        gap.join(one_line(cell, size).ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cells(session: SessionStatus) -> tuple[str, ...]:
    return (
        session.name or session.session_id,
        session.sandbox,
        session.state if session.lost is None else f"lost: {session.lost}",
        ago(session.age_s),
        "-" if session.state == "running" else ago(session.idle_s),
        "-" if session.ends_in_s is None else ago(session.ends_in_s),
        f"{session.executions:,}",
        "-" if session.memory_bytes is None else size(session.memory_bytes),
        _holder(session),
    )


def _holder(session: SessionStatus) -> str:
    if session.holder is None:
        return "nobody"
    return ("ended: " if session.holder_gone else "") + f"{session.holder} ({session.holder_pid})"


def _address(session: SessionStatus) -> str:
    return f"{session.sandbox}/{session.name or session.session_id}"
