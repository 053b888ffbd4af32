"""``python -m benchmarks``: compare, print the table, write ``docs/benchmarks.json`` and ``docs/benchmarks.png``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import cases, contenders, measure, report


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; exit code 0 unless a contender gave a wrong answer or could not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--no-deno", action="store_true", help="leave dspy.PythonInterpreter out")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the JSON file and the plot")
    chosen = parser.parse_args(argv)

    taking_part = contenders.available(with_deno=not chosen.no_deno)
    print("Comparing " + ", ".join(contender.name for contender in taking_part) + ", in turns:")
    figures = measure.run(taking_part, cases.all_cases(quick=chosen.quick))
    print("\n" + report.table(figures) + "\n")
    chosen.out.mkdir(parents=True, exist_ok=True)
    report.write_json(figures, chosen.out / "benchmarks.json")
    report.plot(figures, chosen.out / "benchmarks.png")
    print(f"Samples: {chosen.out / 'benchmarks.json'}   Plot: {chosen.out / 'benchmarks.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
