"""What ``rlm-sandbox status`` shows: one row for each sandbox of this user."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from host_client.errors import SandboxError
from host_client.owner import Owner
from host_client.providers.container_spec import LABEL_CREATED, LABEL_KIND, LABEL_NAME, LABEL_OWNER, NAMED
from host_client.providers.engine_api import Engine
from host_client.providers.exec_tunnel import transport_by
from host_client.providers.exits import death_reason
from host_client.providers.launch import handle_of
from host_client.transport import Transport

#: A broker answers in a millisecond; a table must not wait for one that is stuck.
_ASK_TIMEOUT_S = 2.0

HEADINGS = ("NAME", "STATE", "SINCE", "SESSIONS", "MEMORY", "IMAGE", "STARTED BY")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sandbox, as text."""

    name: str
    state: str
    since: str
    sessions: str
    memory: str
    image: str
    started_by: str

    def cells(self) -> tuple[str, ...]:
        """Return the texts in the order of ``HEADINGS``."""
        return (self.name, self.state, self.since, self.sessions, self.memory, self.image, self.started_by)


def describe(engine: Engine, container: Mapping[str, Any], *, now: datetime.datetime) -> Row:
    """Ask engine and broker about one sandbox.

    Args:
        engine: Knows state and limits.
        container: The engine's list entry.
        now: With a time zone.

    Raises:
        SandboxError: The engine does not answer, or the container is gone by now.
    """
    details = engine.inspect(container["Id"])
    labels = container["Labels"]
    reason = death_reason(details["State"])
    state, sessions = f"ended: {reason}", "-"
    if details["State"].get("Status") == "created":
        state = "never started"
    elif details["State"].get("Paused"):
        state = "paused"
    elif reason is None:
        count = count_sessions(transport_by(engine, handle_of(container)))
        state, sessions = ("running", str(count)) if count is not None else ("no answer", "?")
    return Row(
        name=labels[LABEL_NAME],
        state=state,
        since=_since(labels.get(LABEL_CREATED, ""), now),
        sessions=sessions,
        memory=size(int(details["HostConfig"]["Memory"])),
        image=str(details["Config"]["Image"]),
        started_by=_starter(labels),
    )


def count_sessions(transport: Transport) -> int | None:
    """Return how many sessions a sandbox has, or None where its broker does not answer; closes the transport."""
    try:
        reply = transport.request("GET", "/v1/health", timeout_s=_ASK_TIMEOUT_S)
    except SandboxError:
        return None
    finally:
        transport.close()
    sessions = reply.header.get("sessions")
    return sessions if type(sessions) is int else None


def table(rows: Sequence[Row]) -> list[str]:
    """Lay out rows in columns under their headings; return the lines."""
    cells = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def size(count: int) -> str:
    """Return a number of bytes as people write it, such as ``1 GiB`` or ``1.5 GiB``."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{count} B"


def ago(seconds: float) -> str:
    """Return a span of time in its largest unit, such as ``3 min``."""
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name}"
    return f"{max(0, int(seconds))} s"


def _since(created: str, now: datetime.datetime) -> str:
    with contextlib.suppress(ValueError):
        moment = datetime.datetime.fromisoformat(created)
        return f"{moment.astimezone(now.tzinfo):%Y-%m-%d %H:%M} ({ago((now - moment).total_seconds())})"
    return "?"


def _starter(labels: Mapping[str, str]) -> str:
    if labels.get(LABEL_KIND) == NAMED:
        return "rlm-sandbox up"
    owner = Owner.parse(labels.get(LABEL_OWNER, ""))
    if owner is None:
        return "?"
    return f"process {owner.pid}" + (" (dead)" if owner.is_dead() else "")
