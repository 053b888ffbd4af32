"""What is measured. A case gives one sample in seconds (or bytes) for one interpreter each time it is asked."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender

MIB = 1 << 20
_fresh = itertools.count()

CONCURRENT = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(1000) as pool:
    total = sum(pool.map(lambda i: double(i), range(1000)))
total
"""


def double(n: int) -> int:
    """Return twice ``n``; the host tool that every contender calls."""
    return 2 * n


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: Shown in the tables.
        sample: Takes a started interpreter and returns one sample.
        rounds: Times that each contender gets its turn.
        batch: Samples taken per turn.
        unit: ``s`` or ``bytes``.
        fresh: Whether each sample needs an interpreter of its own (then ``sample`` gets the contender).
        needs_threads: Leaves out contenders without threads.
    """

    name: str
    sample: Callable[[Any], float]
    rounds: int
    batch: int = 1
    unit: str = "s"
    fresh: bool = False
    needs_threads: bool = False


def timed(action: Callable[[], Any], expected: Any) -> float:
    """Run and time one action; a wrong answer is an error, never a fast sample."""
    begin = time.perf_counter()
    got = action()
    took = time.perf_counter() - begin
    if got != expected:
        raise AssertionError(f"expected {expected!r:.80}, got {got!r:.80}")
    return took


def _to_interactive(contender: Contender) -> float:
    begin = time.perf_counter()
    interpreter = contender.make({"double": double})
    try:
        if interpreter.execute("1 + 1") != 2:
            raise AssertionError("wrong answer")
        return time.perf_counter() - begin
    finally:
        interpreter.shutdown()


def _shutdown(contender: Contender) -> float:
    interpreter = contender.make({"double": double})
    interpreter.execute("1 + 1")
    return timed(interpreter.shutdown, None)


def _memory(contender: Contender) -> float:
    interpreter = contender.make({"double": double})
    try:
        interpreter.execute("1 + 1")
        return float(sum(map(_tree_pss, contender.pids(interpreter))))
    finally:
        interpreter.shutdown()


def _tree_pss(root: int) -> int:
    """Proportional set size of a process and its descendants, in bytes (``/proc/PID/smaps_rollup``)."""
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        for task in Path(f"/proc/{pid}/task").iterdir():
            todo += [int(child) for child in (task / "children").read_text().split()]
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def _fresh_variable(interpreter: Any) -> float:
    text = f"{next(_fresh):08d}".ljust(MIB, "x")
    return timed(lambda: interpreter.execute("len(text)", {"text": text}), MIB)


_SAME = "y" * (64 * MIB)


def _same_variable(interpreter: Any) -> float:
    return timed(lambda: interpreter.execute("len(big)", {"big": _SAME}), 64 * MIB)


def all_cases(*, quick: bool) -> list[Case]:
    """Return the cases in the order of the tables; ``quick`` takes fewer samples."""
    scale = 1 if quick else 10
    return [
        Case("time to interactive", _to_interactive, rounds=max(3, scale), fresh=True),
        Case("warm execution", lambda i: timed(lambda: i.execute("1 + 1"), 2), rounds=max(4, scale), batch=50),
        Case("one tool call", lambda i: timed(lambda: i.execute("double(21)"), 42), rounds=max(4, scale), batch=50),
        Case("1 MiB fresh variable", _fresh_variable, rounds=max(3, scale), batch=5),
        # Deno takes most of a minute for each.
        Case("same 64 MiB variable again", _same_variable, rounds=max(1, scale // 3)),
        Case(
            "1,000 concurrent tool calls",
            lambda i: timed(lambda: i.execute(CONCURRENT), 999_000),
            rounds=max(2, scale // 3),
            needs_threads=True,
        ),
        Case("shutdown", _shutdown, rounds=max(3, scale), fresh=True),
        Case("memory", _memory, rounds=max(1, scale // 3), unit="bytes", fresh=True),
    ]
