"""The test command: everything in the main environment with coverage, then the conformance tests under each older DSPy.

    python -m tests.run [--fail-under 90] [--skip-legs | --leg 3.1.3 ...] [-- pytest arguments]

Each leg has an environment of its own under ``.venvs/``, made once. A leg that runs no test has failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEGS = ("3.1.3", "3.2.1", "3.3.1")
# Two at a time: pip is bound by one core and by the network in turns.
_PREPARED_AT_ONCE = 2
# Pinned for the main environment, and different in each leg.
_PINNED_PER_LEG = ("dspy", "gepa")
_MINIMUM_COVERAGE = 90.0
# pytest's status for "no tests were collected".
_NO_TESTS = 5


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run of pytest gave."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether tests ran and none failed."""
        return not self.failed and not self.problem and self.passed > 0

    def line(self) -> str:
        """Return the summary's line."""
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped in {self.seconds:.0f} s"
        problem = self.problem or ("" if self.passed or self.failed else "no test ran")
        return f"{self.name:<14} {counts}{'   <- ' + problem if problem else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests and return the exit status."""
    options = _parser().parse_args(argv)
    os.chdir(ROOT)
    legs = [] if options.skip_legs else (options.leg or list(LEGS))
    outcomes = []
    if not options.leg:
        outcomes.append(run_main(options.fail_under, options.pytest_arguments))
    outcomes += run_legs(legs)
    return summarise(outcomes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fail-under", type=float, default=_MINIMUM_COVERAGE, help="least coverage, in percent")
    parser.add_argument("--skip-legs", action="store_true", help="only the main environment")
    parser.add_argument("--leg", action="append", choices=LEGS, help="only this DSPy version (may be repeated)")
    parser.add_argument("pytest_arguments", nargs="*", help="for pytest in the main environment, after --")
    return parser


def run_main(fail_under: float, arguments: Sequence[str]) -> Outcome:
    """Run all tests in this environment, with coverage of the two packages."""
    _say(f"all tests, DSPy {_installed_dspy(Path(sys.executable))}, with coverage")
    coverage = ["--cov=broker", "--cov=host_client", "--cov-report=term", f"--cov-fail-under={fail_under}"]
    return run_pytest("main", Path(sys.executable), [*coverage, *arguments])


def run_legs(versions: Sequence[str]) -> list[Outcome]:
    """Make the legs' environments side by side, then run their tests one after the other: some measure time."""
    with ThreadPoolExecutor(_PREPARED_AT_ONCE) as pool:
        prepared = [(version, pool.submit(ensure_leg, version)) for version in versions]
        for _, future in prepared:
            future.exception()
    outcomes = []
    for version, future in prepared:
        name = f"dspy {version}"
        if error := future.exception():
            outcomes.append(Outcome(name, 0, 0, 0, 0, problem=str(error)))
            continue
        _say(f"conformance tests, DSPy {version}")
        outcomes.append(run_pytest(name, future.result(), ["tests/conformance"]))
    return outcomes


def ensure_leg(version: str) -> Path:
    """Return the Python of the environment with this DSPy, made or made again if what it is made from changed.

    Raises:
        RuntimeError: pip could not make it.
    """
    folder = ROOT / ".venvs" / f"dspy-{version}"
    python, stamp = folder / "bin" / "python", folder / ".ready"
    recipe = b"\0".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "tests/run.py"))
    wanted = hashlib.sha256(recipe + version.encode() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted and _installed_dspy(python) == version:
        return python
    _say(f"environment for DSPy {version} -> {folder.relative_to(ROOT)} (a minute the first time)")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(leg_constraints((ROOT / "constraints.txt").read_text()))
    done = subprocess.run(
        [
            *(str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", "--no-compile"),
            *("-c", str(constraints), "-e", f"{ROOT}[conformance]", f"dspy=={version}"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"pip could not make the environment:\n{done.stderr[-2000:]}")
    stamp.write_text(wanted)
    return python


def leg_constraints(text: str) -> str:
    """Return the pins without those that each DSPy version sets for itself."""
    own = re.compile(rf"^({'|'.join(_PINNED_PER_LEG)})==")
    return "".join(line for line in text.splitlines(keepends=True) if not own.match(line))


def run_pytest(name: str, python: Path, arguments: Sequence[str]) -> Outcome:
    """Run pytest, its output going straight to the terminal, and read its counts from the report that it writes."""
    report = ROOT / ".pytest_cache" / f"report-{name.replace(' ', '-')}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    began = time.monotonic()
    status = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "tests.no_skips", f"--junit-xml={report}", *arguments],
        stdin=subprocess.DEVNULL,
        check=False,
    ).returncode
    return read_report(name, report, status, time.monotonic() - began)


def read_report(name: str, report: Path, status: int, seconds: float) -> Outcome:
    """Return the counts of a JUnit report; a status that they do not explain is a problem of its own."""
    try:
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return Outcome(name, 0, 0, 0, seconds, problem=f"pytest ended with status {status} and wrote no report")
    tests, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    problem = ""
    if status == _NO_TESTS:
        problem = "no test ran"
    elif status != 0 and not failed:
        problem = f"pytest ended with status {status}: coverage below the threshold, or see above"
    return Outcome(name, tests - failed - skipped, failed, skipped, seconds, problem)


def summarise(outcomes: Sequence[Outcome]) -> int:
    """Print one line for each run and, last, the totals; return the exit status."""
    print("\n" + "\n".join(outcome.line() for outcome in outcomes))
    bad = [outcome.name for outcome in outcomes if not outcome.ok]
    if bad or not outcomes:
        print(f"not green: {', '.join(bad) or 'nothing ran'}")
    passed, failed = (sum(getattr(outcome, field) for outcome in outcomes) for field in ("passed", "failed"))
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if bad or not outcomes else 0


def _installed_dspy(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('dspy'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _say(text: str) -> None:
    # In one write: two legs are prepared at once.
    sys.stdout.write(f"[tests] {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
