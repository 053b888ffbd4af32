"""What a sandbox looks like: one value object, from keywords or from ``RLM_SANDBOX_*``."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from broker.protocol import limits
from broker.protocol.opening import MAX_TTL_S, MIN_TTL_S
from host_client.errors import BadSetting
from host_client.secret_values import Secrets

#: The sandbox that is meant where none is named.
DEFAULT_SANDBOX = "default"

_PREFIX = "RLM_SANDBOX_"
_SIZES = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_size(text: str | int) -> int:
    """Return a size in bytes from ``536870912``, ``"512m"`` or ``"2g"`` (powers of 1,024).

    Raises:
        ValueError: Not a size.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([bkmg]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 512m or 2g")
    return int(float(match[1]) * _SIZES[match[2]])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSettings:
    """How sandboxes are made. Every field can be set from the environment too: ``RLM_SANDBOX_MEMORY=2g``.

    Attributes:
        image: Image to run, or None for the one built from this package's own files.
        packages: Requirement strings of extra packages for generated code, such as ``("matplotlib",)``.
        preload: Modules that generated code finds imported already, such as ``("numpy", "pandas")``: they must be in
            the image. Imported once in each sandbox, while it starts; its sessions share their memory.
        memory: Memory limit in bytes (also ``"1g"``); swap is off.
        cpus: CPU limit in cores.
        pids: Most processes and threads.
        tmpfs: Size of ``/tmp`` in bytes (also ``"256m"``); it counts as memory.
        runtime: OCI runtime, such as ``runsc`` for gVisor, or None for the engine's default.
        network: Whether generated code reaches the network, through the engine's default bridge.
        seccomp: Path of a seccomp profile in Docker's format, or None for this package's own.
        insecure: Whether a sandbox that turns out weaker than asked for is used all the same.
        environment: Extra environment variables of generated code. Not for secrets.
        secrets: Secrets that generated code may read as environment variables: values by name, or names alone, whose
            values are read from the environment or ``.env`` when a session is opened. Held as ``Secrets``.
        provider: ``docker``, ``bubblewrap`` (no engine needed), or ``auto``: docker where an engine answers, else
            bubblewrap where that is installed.
        transport: How the broker in a container is reached: ``socket``, in a directory shared with it; ``exec``,
            through a relay that the engine runs in the container; or ``auto``: socket where that can be shared.
        max_sessions: Most sessions in one sandbox.
        session_ttl_s: Seconds without work after which the broker ends a session in a named sandbox, also where no
            program is there any more; or None.
        max_output_bytes: Output kept of one execution.
        max_concurrent_tools: Most host tools run at the same time for one interpreter.
        timeout_includes_tools: Whether time spent in host tools counts against the execution's time-out.
        start_timeout_s: How long a sandbox may take to become healthy.
        warm_pool_size: Sandboxes that a factory keeps ready for its next interpreters, from its first call on; 0 for
            none.
        journal: File of the record of tool calls, ``:memory:`` for one that ends with this process, or None for
            ``$XDG_STATE_HOME/rlm-sandbox/journal.sqlite3``.
        history: Whether runs are recorded for ``rlm-sandbox history``, or the file that they are recorded in instead of
            ``$XDG_STATE_HOME/rlm-sandbox/history.sqlite3``.
    """

    image: str | None = None
    packages: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    memory: int = 1 << 30
    cpus: float = 2.0
    pids: int = 2048
    tmpfs: int = 256 << 20
    runtime: str | None = None
    network: bool = False
    seccomp: str | None = None
    insecure: bool = False
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, str] | Collection[str] = Secrets()
    provider: str = "auto"
    transport: str = "auto"
    max_sessions: int = 64
    session_ttl_s: float | None = None
    max_output_bytes: int = 1 << 20
    max_concurrent_tools: int = 32
    timeout_includes_tools: bool = True
    start_timeout_s: float = 30.0
    warm_pool_size: int = 1
    journal: str | None = None
    history: bool | str = True

    def __post_init__(self) -> None:
        for name in ("memory", "tmpfs"):
            object.__setattr__(self, name, _checked(name, parse_size, getattr(self, name)))
        object.__setattr__(self, "packages", tuple(self.packages))
        object.__setattr__(self, "preload", _checked("preload", _modules, self.preload))
        object.__setattr__(self, "environment", dict(self.environment))
        object.__setattr__(self, "secrets", Secrets.of(self.secrets))
        twice = sorted(set(self.secrets).intersection(self.environment))
        _require("secrets", not twice, Secrets.of(self.secrets), f"other names than those of environment ({twice})")
        _require("memory", self.memory >= 64 << 20, self.memory, "at least 64m")
        _require("tmpfs", self.tmpfs >= 1 << 20, self.tmpfs, "at least 1m")
        _require("cpus", 0.01 <= self.cpus <= 1024, self.cpus, "between 0.01 and 1024")
        _require("pids", self.pids >= 16, self.pids, "at least 16")
        _require("max_sessions", 1 <= self.max_sessions <= 64, self.max_sessions, "between 1 and 64")
        ttl_s = self.session_ttl_s
        _require("session_ttl_s", ttl_s is None or _is_ttl(ttl_s), ttl_s, "seconds, at least 0.1, or None")
        output = self.max_output_bytes
        _require("max_output_bytes", 1024 <= output <= limits.MOST_OUTPUT_BYTES, output, "between 1024 and 8388608")
        _require("max_concurrent_tools", self.max_concurrent_tools >= 1, self.max_concurrent_tools, "at least 1")
        _require("start_timeout_s", self.start_timeout_s > 0, self.start_timeout_s, "more than 0")
        _require("warm_pool_size", 0 <= self.warm_pool_size <= 64, self.warm_pool_size, "between 0 and 64")
        if self.journal is not None:
            object.__setattr__(self, "journal", os.fspath(self.journal))
        _require("journal", self.journal != "", self.journal, "a path, ':memory:' or None")
        if not isinstance(self.history, bool):
            object.__setattr__(self, "history", _checked("history", os.fspath, self.history))
        _require("history", self.history not in ("", ":memory:"), self.history, "True, False or a path")
        _require("network", isinstance(self.network, bool), self.network, "True or False")
        _require("insecure", isinstance(self.insecure, bool), self.insecure, "True or False")
        known = self.provider in ("auto", "docker", "bubblewrap")
        _require("provider", known, self.provider, "'auto', 'docker' or 'bubblewrap'")
        known = self.transport in ("auto", "socket", "exec")
        _require("transport", known, self.transport, "'auto', 'socket' or 'exec'")
        possible = not (self.transport == "exec" and self.provider == "bubblewrap")
        _require(
            "transport", possible, self.transport, "'auto' or 'socket' with provider='bubblewrap': no engine is there"
        )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> SandboxSettings:
        """Read ``RLM_SANDBOX_<FIELD>`` for every field; keywords win.

        Lists are separated by commas, ``environment`` is ``NAME=value`` pairs separated by commas.

        Raises:
            BadSetting: A variable cannot be read as its field, or names no field.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            raw = environ.get(_PREFIX + field.name.upper())
            if raw is not None and raw != "":
                values[field.name] = _checked(_PREFIX + field.name.upper(), _PARSERS.get(field.name, str), raw)
        return cls(**{**values, **overrides})


def _checked(name: str, parse: Callable[[Any], Any], raw: Any) -> Any:
    try:
        return parse(raw)
    except (ValueError, TypeError) as error:
        raise BadSetting(f"setting {name}: {error}") from None


def _require(name: str, holds: bool, value: object, wanted: str) -> None:
    if not holds:
        raise BadSetting(f"setting {name}={value!r}: must be {wanted}")


def _is_ttl(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and MIN_TTL_S <= value <= MAX_TTL_S


def _parse_flag(raw: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if raw.lower() not in known:
        raise ValueError(f"{raw!r} is neither true nor false")
    return known[raw.lower()]


def _parse_flag_or_path(raw: str) -> bool | str:
    try:
        return _parse_flag(raw)
    except ValueError:
        return raw


def _parse_list(raw: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in raw.split(",") if part.strip())


def _modules(names: Collection[str]) -> tuple[str, ...]:
    for name in (names,) if isinstance(names, str) else names:
        if isinstance(names, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"{name!r} must be a tuple of names of modules, such as ('numpy', 'pandas')")
    return tuple(names)


def _parse_pairs(raw: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in _parse_list(raw)]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise ValueError(f"{raw!r} is not NAME=value,NAME=value")
    return {name: value for name, _, value in pairs}


_PARSERS: dict[str, Callable[[str], Any]] = {
    "packages": _parse_list,
    "preload": _parse_list,
    "memory": parse_size,
    "tmpfs": parse_size,
    "cpus": float,
    "pids": int,
    "network": _parse_flag,
    "insecure": _parse_flag,
    "environment": _parse_pairs,
    "secrets": _parse_list,
    "max_sessions": int,
    "session_ttl_s": float,
    "max_output_bytes": int,
    "max_concurrent_tools": int,
    "timeout_includes_tools": _parse_flag,
    "start_timeout_s": float,
    "history": _parse_flag_or_path,
    "warm_pool_size": int,
}
