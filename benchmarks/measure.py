"""Takes the samples: contenders take turns within each case, so that noise meets all of them alike."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks.agents import AgentGone
from benchmarks.cases import Case
from benchmarks.contenders import LACKS
from benchmarks.curves import POINT_LIMIT_S, Curve

#: A contender whose first sample takes longer gives that one only: its place in the order is clear.
_ONCE_S = 4.0
#: What the turns of one contender in one case may take together; a slow one then has fewer samples.
_BUDGET_S, _QUICK_BUDGET_S = 12.0, 5.0
#: A turn of a batch may take so long, or has fewer samples.
_TURN_S = 1.0
_REPEATS_S = 0.5
#: One sample says little of what touches much fresh memory: 64 MiB take from 120 to 480 ms.
_LEAST_SAMPLES, _LEAST_S = 5, 4.0


class Asked(Protocol):
    """What this needs of ``agents.Agent``."""

    name: str
    lacks: frozenset[str]
    slow: bool

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and return the reply."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """The samples of one case for one contender, with the usual summary.

    Attributes:
        case: The case's key.
        contender: Its name.
        unit: The case's.
        samples: In seconds or bytes.
        cpu_s: Mean CPU time of one operation by role, in seconds.
    """

    case: str
    contender: str
    unit: str
    samples: tuple[float, ...]
    cpu_s: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p95(self) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]

    def to_json(self) -> dict[str, Any]:
        """Return summary and samples as a JSON object; times in seconds, memory in bytes."""
        return {
            "case": self.case,
            "contender": self.contender,
            "unit": self.unit,
            "median": self.median,
            "p95": self.p95,
            "cpu_s": self.cpu_s,
            "samples": list(self.samples),
        }


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """What was measured at one point of one curve for one contender."""

    curve: str
    contender: str
    x: int
    measures: dict[str, float]


@dataclasses.dataclass
class Outcome:
    """All that a run gave.

    Attributes:
        figures: One for each case and contender.
        points: Of the curves.
        left_out: What is missing, by contender and reason.
    """

    figures: list[Figure] = dataclasses.field(default_factory=list)
    points: list[CurvePoint] = dataclasses.field(default_factory=list)
    left_out: dict[tuple[str, str], list[str]] = dataclasses.field(default_factory=dict)


class Run:
    """One run.

    Args:
        agents: Who takes part.
        quick: Whether slow contenders leave out what is heavy.
    """

    def __init__(self, agents: Sequence[Asked], *, quick: bool = False) -> None:
        self._agents = list(agents)
        self._quick = quick
        # In another order each round: whoever always came after the same one would always find the same caches.
        self._order = random.Random(1)
        self.outcome = Outcome()

    def cases(self, cases: Sequence[Case]) -> None:
        """Take the samples of every case, the contenders in turns."""
        for case in cases:
            print(f"  {case.title} ...", flush=True)
            turns = [_Turns(agent, case, _QUICK_BUDGET_S if self._quick else _BUDGET_S) for agent in self._able(case)]
            for turn in list(turns):
                self._guarded(turn.agent, case.title, turns, turn, turn.first)
            for _ in range(case.rounds):
                for turn in self._order.sample(turns, len(turns)):
                    self._guarded(turn.agent, case.title, turns, turn, turn.take)
            self.outcome.figures += [turn.figure() for turn in turns if turn.samples]

    def curves(self, curves: Sequence[Curve], names: Sequence[str]) -> None:
        """Measure every curve for the contenders of these names, in turns at each point."""
        for curve in curves:
            print(f"  {curve.title}, by {curve.x} ...", flush=True)
            climbs = [_Climb(agent, curve) for agent in self._agents if agent.name in names]
            for x in curve.points:
                for climb in list(climbs):
                    self._guarded(climb.agent, curve.title, climbs, climb, lambda climb=climb, x=x: climb.point(x))
            for climb in climbs:
                if climb.ended is not None:
                    self.note(climb.agent.name, climb.ended[1], f"{curve.title} from {climb.ended[0]} on")
                self.outcome.points += climb.points

    def _able(self, case: Case) -> list[Asked]:
        able = []
        for agent in self._agents:
            if missing := case.needs & agent.lacks:
                self.note(agent.name, LACKS[min(missing)], case.title)
            elif self._quick and agent.slow and case.heavy:
                self.note(agent.name, "it takes too long for a quick run", case.title)
            else:
                able.append(agent)
        return able

    def _guarded(self, agent: Asked, title: str, group: list[Any], member: Any, action: Any) -> None:
        """Let one contender act; one that fails leaves this case, and one that is gone leaves the run."""
        try:
            action()
        except _Failed as error:
            self.note(agent.name, f"it failed: {error}", title)
            group.remove(member)
        except AgentGone as error:
            self.note(agent.name, str(error), f"{title} and all that follows")
            group.remove(member)
            self._agents.remove(agent)

    def note(self, contender: str, why: str, what: str) -> None:
        """Say what a contender has no figure for."""
        print(f"    without {contender}: {why} ({what})", flush=True)
        self.outcome.left_out.setdefault((contender, why), []).append(what)


class _Failed(Exception):
    """The contender answered with an error."""


class _Turns:
    """One contender's part in one case."""

    def __init__(self, agent: Asked, case: Case, budget_s: float) -> None:
        self.agent, self.case = agent, case
        self.samples: list[float] = []
        self._cpu: dict[str, float] = {}
        self._budget_s = budget_s
        self._batch = case.batch

    def first(self) -> None:
        """A sample that does not count, for imports and first times; of a very slow contender it is the only one."""
        self._checked(self.agent.ask(op="prepare", case=self.case.key))
        taken, took = self._one()
        if took < _TURN_S and self.case.batch > 1:  # it may have been slow for once, and a batch is many
            _, took = self._one()
        self._batch = max(1, min(self.case.batch, int(_TURN_S / max(took, 1e-6))))
        if took > _ONCE_S:
            self.samples += taken["samples"]
            self._budget_s = 0.0

    def _one(self) -> tuple[dict[str, Any], float]:
        begin = time.monotonic()
        taken = self._ask(1)
        return taken, time.monotonic() - begin - self.case.pause_s

    def take(self) -> None:
        """Take one turn, unless the time of this contender is used up."""
        if self._budget_s <= 0:
            return
        begin = time.monotonic()
        taken = self._ask(self._batch)
        self._budget_s -= time.monotonic() - begin - self.case.pause_s
        self.samples += taken["samples"]
        for role, spent in taken.get("cpu_s", {}).items():
            self._cpu[role] = self._cpu.get(role, 0.0) + spent * len(taken["samples"])

    def figure(self) -> Figure:
        """Return what was taken."""
        mean = {role: spent / len(self.samples) for role, spent in self._cpu.items()}
        return Figure(self.case.key, self.agent.name, self.case.unit, tuple(self.samples), mean)

    def _ask(self, count: int) -> dict[str, Any]:
        return self._checked(self.agent.ask(op="sample", case=self.case.key, count=count))

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "error" in answer:
            raise _Failed(answer["error"])
        return answer


class _Climb:
    """One contender's way up one curve."""

    def __init__(self, agent: Asked, curve: Curve) -> None:
        self.agent, self.curve = agent, curve
        self.points: list[CurvePoint] = []
        self.ended: tuple[str, str] | None = None

    def point(self, x: int) -> None:
        """Measure one point, again while that is cheap, unless the one before says that it takes too long."""
        if self.ended is not None:
            return
        if self.curve.in_bytes and self.points:
            last = self.points[-1]
            if last.measures["wall_s"] * x / last.x > POINT_LIMIT_S:
                self.ended = (f"{x:,}", f"it would take more than {POINT_LIMIT_S:.0f} s")
                return
        taken: list[dict[str, float]] = []
        begin = time.monotonic()
        while not taken or (self.curve.in_bytes and _goes_on(time.monotonic() - begin, len(taken))):
            answer = self.agent.ask(op="point", curve=self.curve.key, x=x)
            if "point" not in answer:
                self.ended = (f"{x:,}", str(answer.get("not_tried") or answer.get("error")))
                return
            taken.append(answer["point"])
        middle = {name: statistics.median(point[name] for point in taken) for name in taken[0]}
        self.points.append(CurvePoint(self.curve.key, self.agent.name, x, middle))


def _goes_on(took_s: float, samples: int) -> bool:
    """Tell whether a point of a curve takes one more sample."""
    return took_s < (_LEAST_S if samples < _LEAST_SAMPLES else _REPEATS_S) and samples < 9
