"""Cost curves: what grows with a size or a number, for us and for the baseline."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.processes import Processes, available_bytes, pss_bytes
from benchmarks.state import State, WrongAnswer, metered

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
#: Copies of a value that may exist at once, in all processes together: what must be free before it is tried.
_COPIES = 8
#: A point that the one before says takes longer is left out, and the curve ends there.
POINT_LIMIT_S = 8.0
#: Tool calls of one point of the concurrency curve, at least: enough to forget the start of the threads.
_CALLS = 2000

_MANY_CALLS = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(threads) as pool:
    total = sum(pool.map(lambda i: double(i), range(calls)))
total
"""
_BUSY = """
import time
done, worst, end = 0, 0.0, time.monotonic() + seconds
while (begin := time.monotonic()) < end:
    double(done)
    done, worst = done + 1, max(worst, time.monotonic() - begin)
[done, worst]
"""
_fresh = itertools.count()
Point = dict[str, float]
# The interpreter with room for what the curves ask of it.
_ROOMY = "roomy"


class NotTried(Exception):
    """A point that this machine has no room for; the message says so."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
        key: What ``--only`` takes.
        title: Shown on the plot.
        x: What the horizontal axis is.
        y: The key of the measure that is drawn, and what its axis says.
        points: Where it is measured, ascending.
        measure: Takes the state and the point; returns named measures, ``wall_s`` and ``cpu_s`` among them.
        in_bytes: Whether ``points`` are sizes.
    """

    key: str
    title: str
    x: str
    y: tuple[str, str]
    points: Sequence[int]
    measure: Callable[[State, int], Point]
    in_bytes: bool = False


def _room_for(size: int) -> None:
    if available_bytes() < size * _COPIES:
        raise NotTried(f"{size:,} bytes need {_COPIES} times as much free memory; there is less")


@contextlib.contextmanager
def _variable(state: State, size: int) -> Iterator[Callable[[str], Point]]:
    _room_for(size)
    interpreter = state.warm(_ROOMY)
    processes = state.processes(_ROOMY)
    yield lambda text: metered(processes, lambda: interpreter.execute("len(text)", {"text": text}), size)
    interpreter.execute("del text\n1")
    interpreter.execute("1")  # and what both sides kept of it is dropped


def _fresh_variable(state: State, size: int) -> Point:
    with _variable(state, size) as send:
        return send(_text(size))


def _same_variable(state: State, size: int) -> Point:
    with _variable(state, size) as send:
        text = _text(size)
        send(text)
        return min((send(text) for _ in range(3)), key=lambda point: point["wall_s"])


def _text(size: int) -> str:
    return f"{next(_fresh):08d}".ljust(size, "x")


def _printed(state: State, size: int) -> Point:
    return _run(state, f'print("o" * {size}, end="")', "o" * size)


def _result(state: State, size: int) -> Point:
    return _run(state, f'"r" * {size}', "r" * size)


def _run(state: State, code: str, expected: str) -> Point:
    interpreter = state.warm(_ROOMY)
    return metered(state.processes(_ROOMY), lambda: interpreter.execute(code), expected)


def _concurrent(state: State, threads: int) -> Point:
    interpreter = state.warm()
    calls = max(_CALLS // 10, 2 * threads) if threads < 4 else max(_CALLS, 2 * threads)
    given = {"threads": threads, "calls": calls}
    point = metered(state.processes("plain"), lambda: interpreter.execute(_MANY_CALLS, given), calls * (calls - 1))
    return {**point, **_rates(point, calls)}


def _rates(point: Point, calls: int) -> Point:
    return {"calls_per_s": calls / point["wall_s"], "cpu_call_s": point["cpu_s"] / calls}


def _sessions(seconds: float) -> Callable[[State, int], Point]:
    def measure(state: State, count: int) -> Point:
        interpreters = state.sessions(count)
        processes = _together(state, interpreters)
        memory = _memory(processes, count)
        ran: list[Any] = []
        given = {"seconds": seconds}
        point = metered(processes, lambda: ran.extend(_all_at_once(interpreters, _BUSY, given)), None)
        done = [int(calls) for calls, _ in ran]
        if min(done) == 0:
            raise WrongAnswer("a session made no call at all")
        return {
            **point,
            **_rates(point, sum(done)),
            "worst_ms": 1e3 * max(worst for _, worst in ran),
            "least_share": min(done) / (sum(done) / count),
            **memory,
        }

    return measure


def _together(state: State, interpreters: list[Any]) -> Processes:
    """Return the processes of all of them, those that they share once, and this one."""
    found: dict[str, set[int]] = {"host": {os.getpid()}}
    for interpreter in interpreters:
        for role, pids in state.contender.processes(interpreter).items():
            found.setdefault(role, set()).update(pids)
    return {role: sorted(pids) for role, pids in found.items()}


def _memory(processes: Processes, count: int) -> Point:
    each = {"worker_bytes_each": pss_bytes(processes["worker"]) / count}
    return {**each, "broker_bytes": float(pss_bytes(processes["broker"]))} if "broker" in processes else each


def _all_at_once(interpreters: list[Any], code: str, variables: dict[str, Any]) -> list[Any]:
    """Run the same code in all sessions, each from a thread of its own, and return the results."""
    gate = threading.Barrier(len(interpreters))
    results: list[Any] = [None] * len(interpreters)

    def run(index: int) -> None:
        gate.wait()
        try:
            results[index] = interpreters[index].execute(code, variables)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(interpreters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def all_curves(*, quick: bool) -> list[Curve]:
    """Return the curves; ``quick`` takes fewer points and shorter ones."""
    sizes: Sequence[int] = [KIB << 2 * step for step in range(11)]  # 1 KiB, 4 KiB, ... 1 GiB
    threads: Sequence[int] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    if quick:
        sizes, threads = sizes[::2], threads[::2]
    outputs = [size for size in sizes if size <= 64 * MIB]
    printed = [size for size in sizes if size <= 16 * MIB]
    sessions = [1, 4, 16, 64] if quick else [1, 2, 4, 8, 16, 32, 64]
    wall, rate = ("wall_s", "ms"), ("calls_per_s", "tool calls / s")
    return [
        Curve("curve-fresh", "fresh str", "size", wall, sizes, _fresh_variable, in_bytes=True),
        Curve("curve-same", "unchanged str", "size", wall, sizes, _same_variable, in_bytes=True),
        Curve("curve-printed", "printed output", "size", wall, printed, _printed, in_bytes=True),
        Curve("curve-result", "result", "size", wall, outputs, _result, in_bytes=True),
        Curve("curve-calls", "calls of one session", "threads that call", rate, threads, _concurrent),
        Curve(
            "curve-sessions",
            "sessions, each calling",
            "sessions",
            rate,
            sessions,
            _sessions(0.3 if quick else 1.0),
        ),
    ]
