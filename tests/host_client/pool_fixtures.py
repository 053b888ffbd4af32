"""Scripted sandboxes that a test starts late, fails or kills; for tests of pools."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from host_client import SandboxPool, SandboxSettings, ScriptedBroker, wait_for_endings
from host_client.pool_registry import of_this_process
from host_client.providers.base import SandboxHandle
from host_client.scripted_steps import ScriptedStep, Step

SETTINGS = SandboxSettings(journal=":memory:")
WAIT_S = 30.0


class Sandboxes(ScriptedBroker):
    """Scripted sandboxes that count as slow, as containers do.

    Attributes:
        may_start: Starts wait for it.
        failures: Errors of the next starts.
        living: Sandboxes that were started and not stopped.
        most: How many there were at most.
    """

    is_slow = True

    def __init__(self, steps: Iterable[ScriptedStep] | None = None) -> None:
        super().__init__(itertools.repeat(Step(value=1)) if steps is None else steps)
        self.may_start, self.may_stop = threading.Event(), threading.Event()
        self.may_start.set()
        self.may_stop.set()
        self.failures: list[Exception] = []
        self.living: dict[str, SandboxHandle] = {}
        self.most = 0

    def start(self, settings: SandboxSettings, *, name: str | None = None) -> SandboxHandle:
        assert self.may_start.wait(WAIT_S)
        if self.failures:
            raise self.failures.pop(0)
        handle = super().start(settings, name=name)
        self.living[handle.sandbox_id] = handle
        self.most = max(self.most, len(self.living))
        return handle

    def stop(self, handle: SandboxHandle) -> None:
        assert self.may_stop.wait(WAIT_S)
        super().stop(handle)
        self.living.pop(handle.sandbox_id, None)

    def lose(self, handle: SandboxHandle | None) -> None:
        """Let one sandbox die while nobody looks."""
        assert handle is not None
        self._clients[handle.sandbox_id].lose("killed")


@pytest.fixture
def sandboxes() -> Sandboxes:
    return Sandboxes()


@pytest.fixture(autouse=True)
def nothing_left(sandboxes: Sandboxes) -> Iterator[None]:
    """Close the pools that a test made; none of their sandboxes is left."""
    yield
    sandboxes.may_start.set()
    sandboxes.may_stop.set()
    of_this_process().close_all()
    for pool in list(of_this_process().named().values()):
        pool.close()
    assert wait_for_endings(WAIT_S)
    assert sandboxes.living == {}


def make(sandboxes: Sandboxes, **keywords: Any) -> SandboxPool:
    keywords = {"name": "p", "settings": SETTINGS, "min_size": 0, "wait_timeout_s": WAIT_S, **keywords}
    return SandboxPool(provider=sandboxes, **keywords)
