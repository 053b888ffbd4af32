"""Snapshots of a live session: what ``SandboxInterpreter.snapshot`` gives."""

from __future__ import annotations

import contextlib
import datetime
from types import TracebackType
from typing import Any

from host_client.broker_client import BrokerClient, SnapshotInfo
from host_client.errors import BadSetting, BrokerUnreachable, SessionLost, UnknownSnapshot
from host_client.value_keeper import KeptState


class Snapshot:
    """A session's namespace as it was: ``rollback`` brings it back, as often as you like.

        with interpreter.snapshot() as before:
            interpreter.execute("risky()")
            interpreter.rollback(before)

    It is a process in the sandbox that waits, and costs the memory that the session has changed since; it ends with the
    session, with ``drop()``, and with its ``with``.

    Attributes:
        name: Given to ``snapshot``, or made up.
        session_id: The session's.
        taken_at: When, in UTC.
        not_kept: What the copy could not keep, by name: threads, child processes, connections, waiting asyncio tasks.
            It is generated code that gave the names.
    """

    def __init__(self, client: BrokerClient, session_id: str, info: SnapshotInfo, kept: KeptState) -> None:
        self.name, self.session_id, self.not_kept = info.name, session_id, info.not_kept
        self.taken_at = datetime.datetime.fromtimestamp(info.taken_at, datetime.timezone.utc)
        self.snapshot_id = info.snapshot_id
        self.kept = kept  # what the copy holds of the host's values
        self._client = client
        self._dropped = False

    def __repr__(self) -> str:
        return f"<Snapshot {self.name!r} of the session {self.session_id}{', dropped' if self._dropped else ''}>"

    def check(self, session_id: str) -> None:
        """Refuse to be used for a session that it is not of, or after ``drop``.

        Raises:
            UnknownSnapshot: It is.
        """
        if self.session_id != session_id:
            raise UnknownSnapshot(
                f"the snapshot {self.name!r} is of the session {self.session_id}, not of {session_id}",
                status=404,
                help="roll back the interpreter that took it; fork() gives further sessions from one point",
            )
        if self._dropped:
            raise UnknownSnapshot(
                f"the snapshot {self.name!r} of the session {session_id} was dropped",
                status=404,
                help="take another one with snapshot()",
            )

    def drop(self) -> None:
        """Forget it, and free its memory. Idempotent; there is nothing to do where the session has ended.

        Raises:
            Fenced: Another client attached to the session, whose snapshot it is now.
        """
        if not self._dropped:
            with contextlib.suppress(SessionLost, BrokerUnreachable):
                self._client.drop_snapshot(self.session_id, self.snapshot_id)
            self._dropped = True

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop()


def checked_snapshot(snapshot: Any) -> Snapshot:
    """Return what is to be rolled back to.

    Raises:
        BadSetting: It is no snapshot.
    """
    if not isinstance(snapshot, Snapshot):
        raise BadSetting(
            f"rollback() takes a Snapshot of this session, got {type(snapshot).__name__}",
            help="keep what snapshot() returned; snapshots() lists those that there are",
        )
    return snapshot
