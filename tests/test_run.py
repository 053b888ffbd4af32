"""Claims about the test command itself: what counts as green."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run import Outcome, leg_constraints, read_report, summarise

ROOT = Path(__file__).resolve().parent.parent

_SKIPPING = """
import pytest

@pytest.mark.docker
def test_engine():
    pytest.skip({reason!r})

def test_something():
    pass
"""


def outcome(passed: int = 3, failed: int = 0, problem: str = "") -> Outcome:
    return Outcome("leg", passed, failed, 0, 1.0, problem)


def test_a_run_without_a_single_test_is_not_green(capsys: pytest.CaptureFixture[str]) -> None:
    assert summarise([outcome(), outcome(passed=0)]) == 1
    assert summarise([]) == 1
    assert "no test ran" in capsys.readouterr().out


def test_one_failure_in_any_leg_is_a_failure() -> None:
    assert summarise([outcome(), outcome(failed=1)]) == 1
    assert summarise([outcome(), outcome(problem="pip could not make the environment")]) == 1


def test_the_last_line_of_a_green_run_is_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert summarise([outcome(), outcome()]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "6 passed, 0 failed"


def test_a_status_without_failures_is_a_problem_of_its_own(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="5" failures="0" errors="0" skipped="1"/></testsuites>')
    assert read_report("main", report, 0, 1.0) == Outcome("main", 4, 0, 1, 1.0)
    assert "coverage" in read_report("main", report, 1, 1.0).problem
    assert not read_report("main", tmp_path / "none.xml", 139, 1.0).ok


def test_a_leg_keeps_all_pins_but_those_that_dspy_sets() -> None:
    assert leg_constraints("dspy==3.4.1\ngepa==0.1.4\nflask==3.1.3\n") == "flask==3.1.3\n"


@pytest.mark.parametrize(
    ("ci", "reason", "status"),
    [("true", "no engine", 1), ("", "no engine", 0), ("true", "DSPy 3.4 and later have the setting", 0)],
)
def test_in_ci_a_docker_test_is_skipped_for_a_dspy_version_or_not_at_all(
    tmp_path: Path, ci: str, reason: str, status: int
) -> None:
    (tmp_path / "test_it.py").write_text(_SKIPPING.format(reason=reason))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    docker: needs an engine\n")
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "tests.no_skips", "--rootdir", str(tmp_path), "test_it.py"]
    environ = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout
