"""Snapshots of one session: frozen copies of its worker, which wait until they are forked or dropped."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterator
from typing import Any

from broker.errors import TooManySnapshots, UnknownSnapshot
from broker.protocol import limits
from broker.worker_link import WorkerLink


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A session's namespace as it was.

    Attributes:
        snapshot_id: Given by the broker.
        name: Chosen by the host, or made up here.
        taken_at: Seconds since 1970.
        not_kept: Names of what a copy lacks.
        worker: The process that holds it.
    """

    snapshot_id: str
    name: str
    taken_at: float
    not_kept: tuple[str, ...]
    worker: WorkerLink

    def to_json(self) -> dict[str, Any]:
        """Return what the host is told."""
        return {
            "snapshot_id": self.snapshot_id,
            "name": self.name,
            "taken_at": self.taken_at,
            "not_kept": list(self.not_kept),
        }


class Snapshots:
    """Those of one session.

    Args:
        session_id: For messages.
    """

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id
        self._all: dict[str, Snapshot] = {}
        self._count = 0
        self._gone: dict[str, str] = {}

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(list(self._all.values()))

    def __getitem__(self, snapshot_id: str) -> Snapshot:
        snapshot = self._all.get(snapshot_id)
        if snapshot is None:
            why = self._gone.get(snapshot_id, "it is another session's, or was dropped")
            raise UnknownSnapshot(f"the session {self._session_id} has no snapshot {snapshot_id[:64]!r}: {why}")
        return snapshot

    def check_room(self) -> None:
        """Refuse one more than there may be.

        Raises:
            TooManySnapshots: There are as many as may be.
        """
        if len(self._all) >= limits.MAX_SNAPSHOTS:
            raise TooManySnapshots(
                f"the session {self._session_id} has {limits.MAX_SNAPSHOTS} snapshots, which is the most; "
                "drop() those that are no longer needed"
            )

    def add(self, worker: WorkerLink, not_kept: tuple[str, ...], name: str | None) -> Snapshot:
        """Keep a copy of the session's worker."""
        self._count += 1
        snapshot = Snapshot(
            snapshot_id=f"n-{secrets.token_hex(8)}",
            name=name or f"snapshot-{self._count}",
            taken_at=round(time.time(), 6),
            not_kept=not_kept,
            worker=worker,
        )
        self._all[snapshot.snapshot_id] = snapshot
        worker.watch(lambda reason: self._ended(snapshot, reason))
        return snapshot

    def drop(self, snapshot_id: str) -> None:
        """End one. Idempotent."""
        snapshot = self._all.pop(snapshot_id, None)
        if snapshot is not None:
            snapshot.worker.kill()

    def drop_all(self) -> None:
        """End every one."""
        for snapshot_id in list(self._all):
            self.drop(snapshot_id)

    def _ended(self, snapshot: Snapshot, reason: str) -> None:
        """Its process is gone, for lack of memory perhaps."""
        if self._all.get(snapshot.snapshot_id) is snapshot:
            self._gone[snapshot.snapshot_id] = f"its process ended ({reason})"
            while len(self._gone) > limits.MAX_SNAPSHOTS:
                del self._gone[next(iter(self._gone))]
            self.drop(snapshot.snapshot_id)
