"""Pytest plugin for CI: a Docker test that is skipped there has failed. A skip is never a pass."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from typing import Any

import pytest

# Whole files of Docker tests: a skip while they are collected hides every test in them.
_DOCKER_FOLDERS = ("tests/docker/", "tests/adversarial/", "tests/faults/")
# A feature that this version of DSPy does not have cannot be tested under it; everything else can.
_ABOUT_A_VERSION = re.compile(r"\bDSPy \d")
_MESSAGE = "skipped under CI=true, where Docker tests must run"


def in_ci() -> bool:
    """Say whether this run is CI's."""
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Turn the skip of a test that is marked ``docker`` into a failure."""
    outcome = yield
    report = outcome.get_result()
    if not in_ci() or not report.skipped or hasattr(report, "wasxfail"):
        return
    if not _ABOUT_A_VERSION.search(str(report.longrepr)) and item.get_closest_marker("docker"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: {_MESSAGE}: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, None]:
    """Turn the skip of a whole file of Docker tests into a failure."""
    outcome = yield
    report = outcome.get_result()
    if in_ci() and report.skipped and collector.nodeid.startswith(_DOCKER_FOLDERS):
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid}: {_MESSAGE}: {report.longrepr}"
