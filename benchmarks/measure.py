"""Takes the samples: contenders take turns within each case, so that noise meets all of them alike."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from benchmarks.cases import Case, double
from benchmarks.contenders import Contender


@dataclasses.dataclass(frozen=True)
class Figure:
    """The samples of one case for one contender, with the usual summary."""

    case: str
    contender: str
    unit: str
    samples: tuple[float, ...]

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
            "samples": list(self.samples),
        }


def run(contenders: list[Contender], cases: list[Case]) -> list[Figure]:
    """Run every case for every contender, in turns.

    A contender that fails a case is reported and left out of that case; the others go on.
    """
    figures: list[Figure] = []
    interpreters = {contender.name: contender.make({"double": double}) for contender in contenders}
    try:
        for interpreter in interpreters.values():
            interpreter.execute("1 + 1")
        for case in cases:
            print(f"  {case.name} ...", flush=True)
            figures += _run_case(case, contenders, interpreters)
    finally:
        for interpreter in interpreters.values():
            interpreter.shutdown()
    return figures


def _run_case(case: Case, contenders: list[Contender], interpreters: dict[str, Any]) -> list[Figure]:
    taking_part = [c for c in contenders if c.threads or not case.needs_threads]
    samples: dict[str, list[float]] = {contender.name: [] for contender in taking_part}
    for contender in list(taking_part):
        _warm_up(case, contender, interpreters)
    for _ in range(case.rounds):
        for contender in taking_part:
            subject = contender if case.fresh else interpreters[contender.name]
            samples[contender.name] += [case.sample(subject) for _ in range(case.batch)]
    return [Figure(case.name, name, case.unit, tuple(taken)) for name, taken in samples.items()]


def _warm_up(case: Case, contender: Contender, interpreters: dict[str, Any]) -> None:
    """One sample that does not count: imports, and for "again" cases the first time."""
    case.sample(contender if case.fresh else interpreters[contender.name])
