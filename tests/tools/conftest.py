from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from broker.testing import InProcessBroker
from host_client import SandboxInterpreter
from host_client.providers.fake import FakeProvider

Make = Callable[..., SandboxInterpreter]


@pytest.fixture(scope="session")
def running_broker() -> Iterator[InProcessBroker]:
    """A broker with real workers; each test has sessions of its own in it."""
    with InProcessBroker() as broker:
        yield broker


@pytest.fixture
def make(running_broker: InProcessBroker) -> Iterator[Make]:
    """Make interpreters that run code in real workers."""
    made: list[SandboxInterpreter] = []

    def make(**keywords: Any) -> SandboxInterpreter:
        interpreter = SandboxInterpreter(
            provider=FakeProvider(running_broker), **{"execution_timeout_s": 60.0, **keywords}
        )
        made.append(interpreter)
        return interpreter

    yield make
    for interpreter in made:
        interpreter.shutdown()
