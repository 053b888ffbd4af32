"""Who holds a session: the program that opened it, or attached to it last."""

from __future__ import annotations

import dataclasses
from typing import Any

from broker.protocol.reading import JsonObject, Reader

MAX_PROGRAM_CHARS = 100
_MAX_IDENTITY_CHARS = 200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeldBy:
    """A program on the host, as it describes itself; for people, and decided upon by nobody.

    Attributes:
        pid: Its process id there.
        program: What it is called, such as ``analysis.py``.
        identity: Tells its process from a later one of the same pid; opaque to the broker.
    """

    pid: int
    program: str
    identity: str = ""

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> HeldBy:
        read = Reader(data, "held_by")
        return cls(
            pid=read.integer("pid"),
            program=read.text("program", max_chars=MAX_PROGRAM_CHARS),
            identity=read.text("identity", "", max_chars=_MAX_IDENTITY_CHARS),
        )

    @classmethod
    def optional(cls, read: Reader) -> HeldBy | None:
        """Read the field ``held_by`` of a message, or None where it is null or missing."""
        return cls.from_json(read.raw("held_by")) if read.has("held_by") else None

    def __str__(self) -> str:
        return f"{self.program} (process {self.pid})"
