"""What tests of values on their way share: a broker in this process, and an interpreter that records nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from broker.testing import InProcessBroker
from host_client import SandboxInterpreter, SandboxSettings
from host_client.providers.fake import FakeProvider


@pytest.fixture(scope="module")
def box() -> Iterator[InProcessBroker]:
    with InProcessBroker() as running:
        yield running


@pytest.fixture
def interpreter(box: InProcessBroker) -> Iterator[SandboxInterpreter]:
    settings = SandboxSettings(journal=":memory:", history=False)
    with SandboxInterpreter(provider=FakeProvider(box), settings=settings) as made:
        yield made
