"""The regression guard: what the hot path may do at most, recorded as ``budget.json`` beside this file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.counting import METRICS, Counts

PATH = Path(__file__).with_name("budget.json")
UPDATE = "python -m benchmarks --record-budget"
_ROOT = Path(__file__).resolve().parents[1]
#: What a count may exceed the recorded one by. Ours differ between Pythons by inlined comprehensions only; what the
#: libraries and the standard library do inside changes with their versions.
HEADROOM = {"own_calls": 1.10, "library_calls": 1.40, "built_in_calls": 1.20, "socket_calls": 1.25}
#: So that a headroom of a small count is still something.
_SLACK = 2
_TIMEOUT_S = 240


def measure() -> Counts:
    """Return today's counts, taken in a process of its own that no coverage or other profiler follows.

    Raises:
        subprocess.CalledProcessError: The counting failed; its words are on standard error.
    """
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.counting"],
        cwd=_ROOT,
        env={**quiet, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=_TIMEOUT_S,
    )
    counts: Counts = json.loads(done.stdout)
    return counts


def recorded(path: Path = PATH) -> Counts:
    """Return the recorded counts."""
    counts: Counts = json.loads(path.read_text("utf-8"))["counts"]
    return counts


def record(counts: Counts, path: Path = PATH) -> None:
    """Make these the budget."""
    path.write_text(json.dumps({"python": platform.python_version(), "counts": counts}, indent=1) + "\n", "utf-8")


def limit(metric: str, budget: int) -> int:
    """Return the most that a count may be."""
    return int(budget * HEADROOM[metric]) + _SLACK


def exceeded(counts: Counts, budget: Counts) -> list[str]:
    """Return a line for each count that has grown past its budget, and for each operation that has none."""
    lines = []
    for operation, role, metric, today in _each(counts):
        allowed = budget.get(operation, {}).get(role, {}).get(metric)
        if allowed is None:
            lines.append(f"{operation}, {role}: {METRICS[metric]} have no budget")
        elif today > limit(metric, allowed):
            grew = f"grew from {allowed} to {today} (at most {limit(metric, allowed)})"
            lines.append(f"{operation}, {role}: {METRICS[metric]} {grew}")
    return lines


def advice(lines: list[str]) -> str:
    """Return what a failing guard says."""
    return "\n".join(
        [
            "The hot path does more than its budget for each operation:",
            *(f"  {line}" for line in lines),
            "Find out why: python -m benchmarks --flame, or docs/performance.md. If it is worth its cost, or is meant,",
            f"record the new counts: {UPDATE}",
        ]
    )


def main(*, record_them: bool) -> int:
    """Print today's counts beside the budget; record them if asked. Exit code 1 if a budget is exceeded."""
    counts = measure()
    if record_them:
        record(counts)
        print(f"Recorded in {PATH.name}.")
    budget = recorded()
    print(f"{'':56}{'today':>8}{'budget':>8}{'limit':>8}")
    for operation, role, metric, today in _each(counts):
        known = budget.get(operation, {}).get(role, {}).get(metric)
        row = f"{operation}, {role}, {metric}"
        print(f"{row:56}{today:>8}" + ("" if known is None else f"{known:>8}{limit(metric, known):>8}"))
    if lines := exceeded(counts, budget):
        print("\n" + advice(lines))
        return 1
    return 0


def _each(counts: Counts) -> Iterator[tuple[str, str, str, int]]:
    for operation, roles in counts.items():
        for role, metrics in roles.items():
            for metric, number in metrics.items():
                yield operation, role, metric, number
