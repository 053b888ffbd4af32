from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from tests.broker.worker.harness import GuestPlane, WorkerProcess


@pytest.fixture
def plane() -> Iterator[GuestPlane]:
    with tempfile.TemporaryDirectory() as folder:  # short: a socket's path has at most 107 bytes
        plane = GuestPlane(f"{folder}/guest.sock")
        yield plane
        plane.close()


@pytest.fixture
def worker(plane: GuestPlane) -> Iterator[WorkerProcess]:
    process = WorkerProcess(plane.path)
    yield process
    process.close()
