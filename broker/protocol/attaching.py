"""Taking a session over from a host that is gone: the new epoch, and what the old one left."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from broker.protocol.reading import JsonObject, Reader


class Verdict(str, enum.Enum):
    """What the new holder says of a call that the old one had started."""

    QUEUED = "queued"
    """Hand it out again: it never ran, or running it twice does no harm."""
    UNKNOWN = "unknown"
    """It may have run, and nobody knows how it ended."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StartedCall:
    """A call that the old holder had claimed and counted as started.

    Attributes:
        call_id: Given by the broker.
        attempt: The attempt that may have run.
        key: Idempotency key.
        tool: Name of the tool.
        execution_id: The execution that made the call.
        idempotent: Whether the tool was declared so when the call was made.
    """

    call_id: str
    attempt: int
    key: str
    tool: str
    execution_id: str
    idempotent: bool

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> StartedCall:
        read = Reader(data, "started call")
        return cls(
            call_id=read.text("call_id", max_chars=64),
            attempt=read.integer("attempt", low=1),
            key=read.text("key", max_chars=64),
            tool=read.text("tool", max_chars=200),
            execution_id=read.text("execution_id", max_chars=64),
            idempotent=read.flag("idempotent"),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """The reply to attaching.

    Attributes:
        epoch: The caller's from now on; every request of an older one is refused.
        execution_id: The execution that runs, or the last one that did, or None.
        running: Whether it still runs.
        started: Calls that the caller must resolve: answer them, or post a ``Verdict``.
    """

    epoch: int
    execution_id: str | None
    running: bool
    started: tuple[StartedCall, ...] = ()

    def to_json(self) -> JsonObject:
        return {
            "epoch": self.epoch,
            "execution_id": self.execution_id,
            "running": self.running,
            "started": [call.to_json() for call in self.started],
        }

    @classmethod
    def from_json(cls, data: Any) -> Attached:
        read = Reader(data, "attached")
        return cls(
            epoch=read.integer("epoch", low=1),
            execution_id=read.optional_text("execution_id", max_chars=64),
            running=read.flag("running"),
            started=tuple(StartedCall.from_json(call) for call in read.items("started", [])),
        )
