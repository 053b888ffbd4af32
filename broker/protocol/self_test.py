"""What a sandbox found out about itself when it started: ``GET /v1/self-test``."""

from __future__ import annotations

import dataclasses
from typing import Any

from broker.protocol.reading import BadRequest, Reader

#: Far above what there is; a reader must not be made to print a novel.
_MAX_CHECKS, _MAX_CHARS = 100, 1000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that should hold.

    Attributes:
        name: What it is about, such as ``io_uring``; stable.
        wanted: What should be the case, in words.
        found: What is the case.
        held: Whether that is as wanted.
    """

    name: str
    wanted: str
    found: str
    held: bool

    def to_json(self) -> dict[str, Any]:
        """Return the wire form."""
        return {"name": self.name, "wanted": self.wanted, "found": self.found, "held": self.held}

    @classmethod
    def from_json(cls, data: Any) -> Check:
        """Read the wire form; raises ``BadRequest``."""
        read = Reader(data, "check")
        texts = {name: read.text(name, max_chars=_MAX_CHARS) for name in ("name", "wanted", "found")}
        return cls(held=read.flag("held"), **texts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the control group says, as seen from inside; None where that cannot be read there.

    Attributes:
        memory_bytes: Memory.
        swap_bytes: Swap beside it.
        pids: Processes and threads.
        cpus: Cores.
    """

    memory_bytes: int | None = None
    swap_bytes: int | None = None
    pids: int | None = None
    cpus: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the wire form."""
        return {
            "memory_bytes": self.memory_bytes,
            "swap_bytes": self.swap_bytes,
            "pids": self.pids,
            "cpus": self.cpus,
        }

    @classmethod
    def from_json(cls, data: Any) -> Limits:
        """Read the wire form; raises ``BadRequest``."""
        read = Reader(data, "limits")
        whole = ("memory_bytes", "swap_bytes", "pids")
        return cls(
            cpus=read.optional_number("cpus"),
            **{name: read.integer(name, high=1 << 63) if read.has(name) else None for name in whole},
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """The whole of it.

    Attributes:
        checks: What the sandbox can judge by itself. None at all where nothing was looked at (a broker without a
            supervisor of its own, in tests).
        limits: For the host to judge: only it knows what it asked for.
        preload_error: Why a module cannot be preloaded, or None where all are.
    """

    checks: tuple[Check, ...] = ()
    limits: Limits = dataclasses.field(default_factory=Limits)
    preload_error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the wire form."""
        return {
            "checks": [check.to_json() for check in self.checks],
            "limits": self.limits.to_json(),
            "preload_error": self.preload_error,
        }

    @classmethod
    def from_json(cls, data: Any) -> SelfTest:
        """Read the wire form.

        Raises:
            BadRequest: A field is missing, of the wrong type, or there are too many.
        """
        read = Reader(data, "self-test")
        checks = read.items("checks")
        if len(checks) > _MAX_CHECKS:
            raise BadRequest(f"self-test: more than {_MAX_CHECKS} checks")
        return cls(
            checks=tuple(Check.from_json(check) for check in checks),
            limits=Limits.from_json(read.mapping("limits")),
            preload_error=read.optional_text("preload_error", max_chars=_MAX_CHARS),
        )
