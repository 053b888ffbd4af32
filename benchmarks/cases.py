"""What is measured, row by row: a case gives one sample for one contender each time it is asked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.processes import pss_bytes
from benchmarks.state import TOOLS, State, WrongAnswer, timed

MIB = 1 << 20
CALLS = 1000
#: Idle sessions beside the first over which "memory of one more" is averaged.
_MORE_SESSIONS = 8
#: Between two samples from a warm pool: as long as any pool needs to be full again.
POOL_FILL_S = 2.0

CONCURRENT = f"""
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor({CALLS}) as threads:
    total = sum(threads.map(lambda i: double(i), range({CALLS})))
total
"""
PANDAS = """
import pandas
frame = pandas.DataFrame({"key": [1, 2, 1], "value": [10, 20, 30]})
int(frame.groupby("key")["value"].sum().max())
"""
_fresh = itertools.count()


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        key: What ``--only`` takes.
        title: Shown in the tables.
        sample: Returns one sample, in ``unit``.
        rounds: Times that each contender gets its turn.
        batch: Samples taken per turn.
        unit: ``s``, ``bytes``, or ``calls``: seconds for ``CALLS`` calls, shown as calls per second.
        variant: The warm interpreter whose CPU time belongs to the samples; None where each has its own.
        needs: Keys of ``contenders.LACKS``.
        heavy: Left out for slow contenders under ``--quick``.
        pause_s: Idle time before each turn of a contender that keeps some warm.
        target: The ratio to LocalInterpreter that is wanted.
    """

    key: str
    title: str
    sample: Callable[[State], float]
    rounds: int
    batch: int = 1
    unit: str = "s"
    variant: str | None = None
    needs: frozenset[str] = frozenset()
    heavy: bool = False
    pause_s: float = 0.0
    target: float | None = None


def _answers(interpreter: Any) -> None:
    if interpreter.execute("1 + 1") != 2:
        raise WrongAnswer("1 + 1")


def _to_interactive(make: Callable[[State], Any]) -> Callable[[State], float]:
    def sample(state: State) -> float:
        begin = time.perf_counter()
        interpreter = make(state)
        try:
            _answers(interpreter)
            return time.perf_counter() - begin
        finally:
            state.contender.discard(interpreter)

    return sample


def _in_fresh(action: Callable[[Any], float], make: Callable[[State], Any] = State.fresh) -> Callable[[State], float]:
    """A sample of something that is done once to an interpreter which has just answered."""

    def sample(state: State) -> float:
        interpreter = make(state)
        try:
            _answers(interpreter)
            return action(interpreter)
        finally:
            state.contender.discard(interpreter)

    return sample


def _warm(
    code: str,
    expected: Any,
    variables: Callable[[], dict[str, Any]] | None = None,
    variant: str = "plain",
) -> Callable[[State], float]:
    def sample(state: State) -> float:
        interpreter = state.warm(variant)
        given = None if variables is None else variables()
        return timed(lambda: interpreter.execute(code, given), expected)

    return sample


@functools.cache
def _big_text() -> dict[str, Any]:
    return {"big": "y" * (64 * MIB)}


@functools.cache
def _list_of_texts() -> dict[str, Any]:
    return {"texts": [f"{i:04d}".ljust(MIB, "z") for i in range(64)]}


def _big_result(state: State) -> float:
    return _warm('"r" * (50 << 20)', "r" * (50 * MIB))(state)


def _fresh_text() -> dict[str, Any]:
    return {"text": f"{next(_fresh):08d}".ljust(MIB, "x")}


def _memory(state: State) -> float:
    interpreter = state.fresh()
    try:
        _answers(interpreter)
        return float(_pss(state, interpreter))
    finally:
        state.contender.discard(interpreter)


def _memory_of_one_more(state: State) -> float:
    with contextlib.ExitStack() as stack:
        open_one = stack.enter_context(state.contender.opener(TOOLS))
        opened: list[Any] = []
        taken = []
        for count in (1, 1 + _MORE_SESSIONS):
            while len(opened) < count:
                opened.append(open_one())
                stack.callback(state.contender.discard, opened[-1])
                _answers(opened[-1])
            taken.append(_all_pss(state, opened))
    return (taken[1] - taken[0]) / _MORE_SESSIONS


def _pss(state: State, interpreter: Any) -> int:
    return pss_bytes(pid for pids in state.contender.processes(interpreter).values() for pid in pids)


def _all_pss(state: State, interpreters: Sequence[Any]) -> int:
    """Of all sessions; processes that they share count once."""
    found = {
        pid for one in interpreters for pids in state.contender.processes(one).values() for pid in pids
    }  # a named sandbox shows all its workers for each of its sessions
    return pss_bytes(found)


_TOOLS = frozenset({"tools"})


def all_cases(*, quick: bool) -> list[Case]:
    """Return the cases in the order of the tables; ``quick`` takes fewer samples."""
    few, some, many = (2, 3, 4) if quick else (4, 8, 20)
    warm: dict[str, Any] = {"rounds": many, "batch": 20 if quick else 50}

    def tool(key: str, title: str, variant: str, target: float | None = None) -> Case:
        sample = _warm("double(21)", 42, variant=variant)
        return Case(key, title, sample, variant=variant, needs=_TOOLS, target=target, **warm)

    return [
        Case("cold", "time to interactive, cold", _to_interactive(State.fresh), rounds=some),
        Case(
            "pool",
            "time to interactive, `factory()`",
            _to_interactive(State.from_factory),
            rounds=some,
            pause_s=POOL_FILL_S,
            target=0.25,
        ),
        Case("warm", "warm execution", _warm("1 + 1", 2), variant="plain", target=0.6, **warm),
        Case(
            "print",
            "the same, printing 1 KiB",
            _warm('print("o" * 1024, end="")', "o" * 1024),
            variant="plain",
            target=0.6,
            **warm,
        ),
        tool("tool", "one tool call, durable journal", "plain"),
        tool("tool-memory", 'one tool call, `journal=":memory:"`', "memory_journal", 0.75),
        tool("tool-idempotent", "one tool call, idempotent tool", "idempotent", 0.75),
        Case("fresh", "fresh 1 MiB str", _warm("len(text)", MIB, _fresh_text), some, 5, variant="plain", target=0.15),
        Case(
            "same",
            "same 64 MiB str again",
            _warm("len(big)", 64 * MIB, _big_text),
            some,
            variant="plain",
            heavy=True,
            target=0.02,
        ),
        Case(
            "list",
            "same list of 64 strs of 1 MiB again",
            _warm("sum(map(len, texts))", 64 * MIB, _list_of_texts),
            some,
            variant="plain",
            heavy=True,
        ),
        Case(
            "result",
            "50 MiB result",
            _big_result,
            some,
            variant="plain",
            heavy=True,
        ),
        Case(
            "concurrent",
            f"{CALLS:,} concurrent tool calls",
            _warm(CONCURRENT, CALLS * (CALLS - 1)),
            some,
            unit="calls",
            variant="plain",
            needs=_TOOLS | {"threads"},
        ),
        Case(
            "concurrent-memory",
            f'{CALLS:,} concurrent tool calls, `journal=":memory:"`',
            _warm(CONCURRENT, CALLS * (CALLS - 1), variant="memory_journal"),
            some,
            unit="calls",
            variant="memory_journal",
            needs=_TOOLS | {"threads"},
        ),
        Case(
            "pandas",
            "import pandas, first groupby",
            _in_fresh(lambda i: timed(lambda: i.execute(PANDAS), 40), State.from_factory),
            few,
            needs=frozenset({"pandas"}),
            pause_s=POOL_FILL_S,
        ),
        Case("shutdown", "shutdown", _in_fresh(lambda i: timed(i.shutdown, None)), rounds=some, target=2.0),
        Case("memory", "memory of one session", _memory, rounds=few, unit="bytes"),
        Case(
            "memory-more",
            "memory of one more idle session",
            _memory_of_one_more,
            rounds=1,
            unit="bytes",
            heavy=True,
        ),
    ]
