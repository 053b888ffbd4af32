from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import dspy
import pytest

from host_client.providers.base import SandboxProvider
from tests.conformance.backends import BACKENDS, CORE_BACKENDS, PROVIDERS, REAL_BACKENDS, Backend

Open = Callable[[str], SandboxProvider | None]


@pytest.fixture(scope="session")
def open_provider() -> Iterator[Open]:
    """Return a provider by name; each is opened once, when the first test asks for it."""
    opened: dict[str, SandboxProvider] = {}
    with contextlib.ExitStack() as stack:

        def open_once(name: str) -> SandboxProvider | None:
            if name in PROVIDERS and name not in opened:
                opened[name] = stack.enter_context(PROVIDERS[name]())
            return opened.get(name)

        yield open_once


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, open_provider: Open) -> Iterator[Backend]:
    made = Backend(request.param, open_provider(request.param))
    yield made
    made.close()


@pytest.fixture(params=CORE_BACKENDS)
def core_backend(request: pytest.FixtureRequest, open_provider: Open) -> Iterator[Backend]:
    """For the contract itself, which every provider keeps."""
    made = Backend(request.param, open_provider(request.param))
    yield made
    made.close()


@pytest.fixture(params=REAL_BACKENDS)
def real_backend(request: pytest.FixtureRequest, open_provider: Open) -> Iterator[Backend]:
    """For claims about what really runs; a script could only repeat them."""
    made = Backend(request.param, open_provider(request.param))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _own_dspy_settings() -> Iterator[None]:
    """Whatever a test sets in DSPy ends with it."""
    with dspy.context():
        yield
