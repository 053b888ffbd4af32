"""``python -m benchmarks``: compare, print the tables, and write them with the plots into ``docs/``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import agents, budget, cases, curves, flame, measure, plots, report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples and points")
    parser.add_argument("--only", default="", metavar="KEY,KEY", help="these cases and curves; prints, writes nothing")
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout, measured in turns as 'before'")
    parser.add_argument("--no-deno", action="store_true", help="leave dspy.PythonInterpreter out")
    parser.add_argument("--no-llm-sandbox", action="store_true", help="leave llm-sandbox out")
    parser.add_argument("--no-curves", action="store_true", help="leave the cost curves out")
    parser.add_argument("--out", type=Path, help="folder for the tables and plots (default: docs)")
    parser.add_argument("--replot", action="store_true", help="draw the plots anew from the figures that are there")
    parser.add_argument("--flame", action="store_true", help="draw the flame graphs of the hot path, and nothing else")
    parser.add_argument("--budget", action="store_true", help="count the hot path's calls beside the recorded budget")
    parser.add_argument("--record-budget", action="store_true", help="record today's counts as the budget")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for; exit code 0 unless nothing could be measured."""
    given = _parser().parse_args(argv)
    if given.budget or given.record_budget:
        return budget.main(record_them=given.record_budget)
    folder = given.out or agents.ROOT / "docs"
    if given.replot:
        outcome = report.read_json(folder / "benchmarks.json")
        plots.write(outcome, cases.all_cases(quick=False), curves.all_curves(quick=False), folder)
        return 0
    if given.flame:
        return flame.main(folder)
    begin = time.monotonic()
    wanted = [key.strip() for key in given.only.split(",") if key.strip()]
    try:
        rows, lines = _chosen(wanted, quick=given.quick, with_curves=not given.no_curves)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcome = _measured(given, rows, lines)
    took_s = time.monotonic() - begin
    print("\n" + report.table(outcome, rows) + "\n\n" + report.cpu_table(outcome, rows))
    if lines:
        print("\n" + report.curve_tables(outcome, lines))
    print(f"\n{took_s:.0f} s")
    if not wanted or given.out is not None:
        folder.mkdir(parents=True, exist_ok=True)
        report.write(outcome, rows, lines, folder, quick=given.quick, took_s=took_s)
        plots.write(outcome, rows, lines, folder)
        print(f"Written: {folder}/benchmarks.json, {folder}/performance.md and the plots beside them")
    return 0 if outcome.figures or outcome.points else 1


def _chosen(wanted: Sequence[str], *, quick: bool, with_curves: bool) -> tuple[list[cases.Case], list[curves.Curve]]:
    """Return the cases and curves of these keys; all where there are none.

    Raises:
        ValueError: A key that nothing has.
    """
    rows, lines = cases.all_cases(quick=quick), curves.all_curves(quick=quick)
    known = {row.key for row in rows} | {line.key for line in lines}
    if unknown := sorted(set(wanted) - known):
        raise ValueError(f"there is no case or curve {unknown[0]!r}; there are {', '.join(sorted(known))}")
    if wanted:
        return [row for row in rows if row.key in wanted], [line for line in lines if line.key in wanted]
    return rows, lines if with_curves else []


def _measured(given: argparse.Namespace, rows: Sequence[cases.Case], lines: Sequence[curves.Curve]) -> measure.Outcome:
    kinds = ["sandbox", "local"]
    kinds += [] if given.no_deno else ["deno"]
    kinds += [] if given.no_llm_sandbox else ["llm-sandbox"]
    taking_part, missing = agents.start(kinds, against=given.against, quick=given.quick)
    run = measure.Run(taking_part, quick=given.quick)
    try:
        for name, why in missing.items():
            run.note(name, why, "everything")
        print("Comparing " + ", ".join(agent.name for agent in taking_part) + ", in turns:")
        run.cases(rows)
        run.curves(lines, [agent.name for agent in taking_part if not agent.slow])
    finally:
        for agent in taking_part:
            agent.close()
    return run.outcome


if __name__ == "__main__":
    sys.exit(main())
