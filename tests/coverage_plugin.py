"""Takes a lock out of coverage.py: the processes that it measures here are interrupted and forked at any instruction.

Its tracer takes a lock, in Python code, at the first call into each file. A KeyboardInterrupt that strikes just then,
or a fork while another thread is there, leaves the lock taken for ever, and the measured process hangs. What it guards,
the insertion of a key into a dict, is atomic under the interpreter's lock; its reader tries again by itself.
"""

from __future__ import annotations

from typing import Any

from coverage.collector import Collector


def coverage_init(registry: object, options: dict[str, Any]) -> None:
    """Called by coverage.py in each measured process, before it begins (``tool.coverage.run`` in pyproject.toml)."""
    Collector.lock_data = Collector.unlock_data = _nothing  # type: ignore[method-assign]


def _nothing(collector: Collector) -> None:
    pass
