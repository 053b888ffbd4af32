"""Reading ``/proc/<pid>/status``, and what a process may do by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
#: The bits that somebody here may hold.
_NAMES = {5: "KILL", 6: "SETGID", 7: "SETUID", 8: "SETPCAP"}


def read_status(pid: str | int) -> dict[str, str]:
    """Return the fields of a process's status."""
    lines = Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def capability_names(mask: str) -> list[str]:
    """Return the names of a set of capabilities, given in hexadecimal; numbers where a name is not among ours."""
    bits = int(mask, 16)
    return [_NAMES.get(bit, str(bit)) for bit in range(64) if bits >> bit & 1]


def has_no_capabilities(status: Mapping[str, str]) -> tuple[bool, str]:
    """Return whether a process holds no capability in any of the five sets, and the words for it."""
    held = {name: capability_names(status.get(name, "0")) for name in CAPABILITY_SETS}
    found = "; ".join(f"{name} {', '.join(names)}" for name, names in held.items() if names)
    return not found, found or "none"
