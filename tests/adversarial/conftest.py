"""Fixtures of the suite, and its table at the end."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from host_client import SandboxInterpreter, SandboxSettings
from tests.adversarial.arena import LIMITS, Arena
from tests.adversarial.outcomes import Witnesses
from tests.adversarial.report import Report
from tests.docker.sandboxes import image

__all__ = ["image"]

#: By provider.
_REPORTS = pytest.StashKey[dict[str, Report]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "family(name): the family of attacks that a test belongs to")
    config.addinivalue_line("markers", "provider(name): what made the sandboxes, where that is not docker")
    config.addinivalue_line("markers", "weakened: the attack must succeed, in the weakened build")


@pytest.fixture(scope="session")
def witnesses(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Witnesses]:
    """The host's canary, in a file and in the environment, and a sibling in a sandbox of its own."""
    canary = f"canary-{secrets.token_hex(8)}"
    path = tmp_path_factory.mktemp("host") / "canary"
    path.write_text(canary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOST_CANARY", canary)
        with SandboxInterpreter(settings=SandboxSettings(image=image, **LIMITS)) as sibling:
            yield Witnesses(canary, path, sibling)


@pytest.fixture(scope="module")
def arena(image: str, witnesses: Witnesses) -> Iterator[Arena]:
    """The real build."""
    made = Arena(image, witnesses.canary, weak=False)
    yield made
    made.close()


@pytest.fixture(scope="module")
def weak_arena(image: str, witnesses: Witnesses) -> Iterator[Arena]:
    """The weakened build."""
    made = Arena(image, witnesses.canary, weak=True)
    yield made
    made.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    marker = item.get_closest_marker("family")
    if marker is None or not (report.when == "call" or (report.when == "setup" and not report.passed)):
        return
    made_by = item.get_closest_marker("provider")
    provider = "docker" if made_by is None else made_by.args[0]
    table = item.config.stash.setdefault(_REPORTS, {}).setdefault(provider, Report(provider))
    weak = item.get_closest_marker("weakened") is not None
    table.add(marker.args[0], item.name, weak=weak, passed=report.passed)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for table in config.stash.get(_REPORTS, {}).values():
        terminalreporter.section(f"adversarial suite, provider {table.provider}")
        for line in table.lines():
            terminalreporter.write_line(line)
        table.write()
