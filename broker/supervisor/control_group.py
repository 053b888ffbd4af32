"""The limits of our control group as they can be read inside the sandbox, version 2 or 1."""

from __future__ import annotations

from pathlib import Path

from broker.protocol.self_test import Limits

_ROOT = Path("/sys/fs/cgroup")
#: Version 1 says "no limit" with a number near the largest that there is.
_NO_LIMIT = 1 << 60


def read_limits(root: Path = _ROOT) -> Limits:
    """Return the limits; None where there is none, or where it cannot be read."""
    if (root / "memory.max").exists():
        quota, _, period = (_text(root / "cpu.max") or "").partition(" ")
        memory = _number(root / "memory.max")
        swap = _number(root / "memory.swap.max")
        return Limits(memory_bytes=memory, swap_bytes=swap, pids=_number(root / "pids.max"), cpus=_cpus(quota, period))
    memory = _number(root / "memory" / "memory.limit_in_bytes")
    both = _number(root / "memory" / "memory.memsw.limit_in_bytes")
    return Limits(
        memory_bytes=memory,
        swap_bytes=None if memory is None or both is None else max(0, both - memory),
        pids=_number(root / "pids" / "pids.max"),
        cpus=_cpus(_text(root / "cpu" / "cpu.cfs_quota_us"), _text(root / "cpu" / "cpu.cfs_period_us")),
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdigit() and int(text) < _NO_LIMIT else None


def _cpus(quota: str | None, period: str | None) -> float | None:
    if quota is None or period is None or not quota.isdigit() or not period.isdigit() or period == "0":
        return None
    return int(quota) / int(period)
