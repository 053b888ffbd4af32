"""Brokers and sessions for the tests of this folder."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from broker.protocol.frames import Blob
from broker.protocol.messages import Progress
from broker.testing import InProcessBroker

TOOLS = [{"name": "search", "parameters": None}]


@dataclasses.dataclass
class Client:
    """One session on one broker, over real HTTP."""

    box: InProcessBroker
    session_id: str
    ids: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))

    @classmethod
    def open(cls, box: InProcessBroker) -> Client:
        status, session, _ = box.host.request("POST", "/v1/sessions")
        assert status == 201, session
        return cls(box, session["session_id"])

    def post(
        self, code: str, *, wait_s: float = 20, blobs: Sequence[Blob] = (), query: str = "", **fields: Any
    ) -> tuple[int, dict[str, Any], list[memoryview]]:
        payload = {"execution_id": f"{self.session_id}-{next(self.ids)}", "code": code, "tools": TOOLS, **fields}
        path = f"/v1/sessions/{self.session_id}/executions?wait_s={wait_s}{query}"
        return self.box.host.request("POST", path, payload, blobs)

    def run(self, code: str, **fields: Any) -> Progress:
        status, reply, _ = self.post(code, **fields)
        assert status == 200, reply
        return Progress.from_json(reply)

    def claims(self, **wanted: Any) -> tuple[int, dict[str, Any], list[memoryview]]:
        return self.box.host.request("POST", f"/v1/sessions/{self.session_id}/claims", wanted)

    def answer(self, call_id: str, value: Any = None, blobs: Sequence[Blob] = (), attempt: int = 1) -> int:
        payload = {"attempt": attempt, "value": value}
        return self.box.host.request("POST", f"/v1/tool-calls/{call_id}/result", payload, blobs)[0]

    def close(self) -> int:
        return self.box.host.request("DELETE", f"/v1/sessions/{self.session_id}")[0]


@pytest.fixture(scope="module")
def real() -> Iterator[InProcessBroker]:
    """A broker with real workers, shared by the tests of a module."""
    with InProcessBroker() as box:
        yield box


@pytest.fixture
def worker(real: InProcessBroker) -> Iterator[Client]:
    client = Client.open(real)
    yield client
    client.close()
