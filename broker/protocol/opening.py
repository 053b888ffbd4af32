"""Opening a session: its name, and the secrets that its code may read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from broker.protocol.holding import HeldBy
from broker.protocol.reading import BadRequest, JsonObject, Reader

#: A name is for people and for command lines.
MAX_NAME_CHARS = 64
#: What a process can hand to the programs that it starts, with room for the rest of its environment.
MAX_SECRETS = 64
MAX_SECRET_BYTES = 32 << 10
MAX_ALL_SECRETS_BYTES = 256 << 10
#: Times to live, in seconds: shorter ones would race with the client's own next request; ten years are for ever.
MIN_TTL_S = 0.1
MAX_TTL_S = 315_360_000.0

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
#: Set by the sandbox itself.
_TAKEN = frozenset({"HOME", "TMPDIR", "USER", "LOGNAME", "PATH", "LANG"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    """What a new session begins with.

    Attributes:
        name: To find it by, or None.
        secrets: Environment variables of its code alone; neither logged nor shown.
        keep: Whether clients leave it as it is when they go, instead of closing it; the broker only tells them.
        ttl_s: Idle time in seconds after which the broker ends it, or None.
        held_by: Who opens it, for people; or None.
    """

    name: str | None = None
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    keep: bool = False
    ttl_s: float | None = None
    held_by: HeldBy | None = None

    def to_json(self) -> JsonObject:
        """Return the body; it holds the values."""
        return {
            **({} if self.name is None else {"name": self.name}),
            **({"secrets": dict(self.secrets)} if self.secrets else {}),
            **({"keep": True} if self.keep else {}),
            **({} if self.ttl_s is None else {"ttl_s": self.ttl_s}),
            **({} if self.held_by is None else {"held_by": self.held_by.to_json()}),
        }

    @classmethod
    def from_json(cls, data: Any) -> OpenRequest:
        """Read a body; what is wrong with it is told without its values."""
        read = Reader(data, "session")
        secrets = read.mapping("secrets") if read.has("secrets") else {}
        if (problem := secrets_problem(secrets)) is not None:
            raise BadRequest(f"session: {problem}")
        return cls(
            name=read.optional_text("name", max_chars=MAX_NAME_CHARS),
            secrets=secrets,
            keep=read.flag("keep", False),
            ttl_s=read.optional_number("ttl_s", low=MIN_TTL_S, high=MAX_TTL_S),
            held_by=HeldBy.optional(read),
        )


def secrets_problem(secrets: Mapping[Any, Any]) -> str | None:
    """Return what is wrong with secrets, without their values, or None."""
    for name, value in secrets.items():
        if (problem := secret_name_problem(name)) is not None:
            return problem
        if (problem := _value_problem(value)) is not None:
            return f"secret {name}: {problem}"
    if len(secrets) > MAX_SECRETS:
        return f"{len(secrets)} secrets; at most {MAX_SECRETS} are taken"
    if sum(len(value.encode()) for value in secrets.values()) > MAX_ALL_SECRETS_BYTES:
        return f"the secrets have more than {MAX_ALL_SECRETS_BYTES:,} bytes together"
    return None


def secret_name_problem(name: Any) -> str | None:
    """Return why a secret cannot have this name, or None."""
    if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
        # Not shown: somebody may have put the value where the name belongs.
        return "the name of a secret must be one of an environment variable: letters, digits and '_'"
    return f"secret {name}: the sandbox sets this variable itself" if name in _TAKEN else None


def _value_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"must be a string, got {type(value).__name__}"
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return "must be text that UTF-8 has"
    if "\0" in value:
        return "must not contain a NUL character"
    return None if size <= MAX_SECRET_BYTES else f"has {size:,} bytes; at most {MAX_SECRET_BYTES:,} are taken"
