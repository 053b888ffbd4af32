"""Claims about requests and about what the broker's answers mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from broker.protocol import PROTOCOL_VERSION
from broker.protocol.messages import Claim, ClaimRequest, ErrorInfo, ExecuteRequest, Progress, ToolResult
from host_client.broker_client import HttpBrokerClient
from host_client.errors import (
    BrokerError,
    CallGone,
    LeaseExpired,
    MalformedReply,
    ProtocolMismatch,
    SandboxError,
    SessionBusy,
    SessionLost,
)
from host_client.transport import Reply

REQUEST = ExecuteRequest(execution_id="e1", code="1")
RUNNING = Progress(execution_id="e1", running=True).to_json()


class FakeTransport:
    """Answers with the given replies and notes the requests."""

    def __init__(self, *replies: Reply) -> None:
        self.replies, self.requests = list(replies), []  # type: ignore[var-annotated]
        self.timeouts: list[float] = []

    def request(
        self, method: str, path: str, header: Any = None, blobs: Sequence[Any] = (), *, timeout_s: float, **_: Any
    ) -> Reply:
        self.requests.append((method, path, header, list(blobs)))
        self.timeouts.append(timeout_s)
        return self.replies.pop(0)

    def close(self) -> None:
        self.requests.append("closed")


def _client(header: dict[str, Any], status: int = 200, blobs: Sequence[Any] = ()) -> HttpBrokerClient:
    return HttpBrokerClient(FakeTransport(Reply(status, header, list(blobs))))


def test_another_protocol_is_refused_with_both_versions_and_the_command() -> None:
    with pytest.raises(ProtocolMismatch) as caught:
        _client({"protocol": 99}).check()
    assert "99" in str(caught.value)
    assert f"version {PROTOCOL_VERSION}" in str(caught.value)
    assert "rlm-sandbox image" in str(caught.value)


def test_our_own_protocol_passes() -> None:
    _client({"protocol": PROTOCOL_VERSION}).check()


def test_the_requests_are_those_of_the_protocol() -> None:
    transport = FakeTransport(
        Reply(201, {"session_id": "s1"}, []),
        Reply(200, RUNNING, []),
        Reply(200, RUNNING, []),
        Reply(200, {}, []),
        Reply(200, {}, []),
        Reply(404, {"error": {"code": "unknown_session", "message": "gone"}}, []),
    )
    client = HttpBrokerClient(transport)
    assert client.open_session() == "s1"
    client.execute("s1", REQUEST, [b"x"], ClaimRequest(limit=3, wait_s=1.5), late_s=2)
    client.claim("s1", ClaimRequest(limit=0, wait_s=4), late_s=2)
    client.answer("a/b", ToolResult(attempt=1, value=2), [b"y"])
    client.interrupt("s1", "e1")
    client.close_session("s1")
    client.close()
    assert [request[:2] for request in transport.requests[:-1]] == [
        ("POST", "/v1/sessions"),
        ("POST", "/v1/sessions/s1/executions?limit=3&wait_s=1.500&epoch=1"),
        ("POST", "/v1/sessions/s1/claims?epoch=1"),
        ("POST", "/v1/tool-calls/a%2Fb/result?epoch=1"),
        ("POST", "/v1/executions/e1/interrupt?epoch=1"),
        ("DELETE", "/v1/sessions/s1?epoch=1"),
    ]
    assert transport.timeouts[1:3] == [pytest.approx(3.5, abs=0.01), 6]
    assert transport.requests[-1] == "closed"


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (409, {"code": "session_busy", "message": "m"}, SessionBusy),
        (409, {"code": "lease_expired", "message": "m"}, LeaseExpired),
        (410, {"code": "call_gone", "message": "m"}, CallGone),
        (404, {"code": "unknown_call", "message": "m"}, CallGone),
        (404, {"code": "unknown_session", "message": "m"}, SessionLost),
        (410, {"code": "session_lost", "message": "m", "reason": "oom"}, SessionLost),
        (500, {"code": "something_new", "message": "m"}, BrokerError),
        (500, "text", BrokerError),
        (302, {"code": ["a"], "message": 3}, BrokerError),
    ],
)
def test_an_error_has_its_class(status: int, error: Any, kind: type[SandboxError]) -> None:
    with pytest.raises(kind) as caught:
        _client({"error": error}, status).claim("s1", ClaimRequest())
    assert type(caught.value) is kind
    if isinstance(caught.value, BrokerError):
        assert caught.value.status == status
    if status == 410 and isinstance(caught.value, SessionLost):
        assert caught.value.reason == "oom"


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"running": "yes"},
        {"running": True, "execution_id": 3},
        {"running": True, "claims": [{}]},
        {"running": False, "result": {"outcome": "wonderful"}},
    ],
)
def test_a_reply_with_wrong_fields_is_malformed(header: dict[str, Any]) -> None:
    with pytest.raises(MalformedReply):
        _client(header).claim("s1", ClaimRequest())


@pytest.mark.parametrize("blob_range", [(0, 2), (-1, 1), (1, 0)])
def test_a_claim_cannot_refer_to_blobs_that_are_not_there(blob_range: tuple[int, int]) -> None:
    claim = Claim(
        call_id="c", attempt=1, tool="t", args=[], kwargs={}, execution_id="e1", lease_s=1, blob_range=blob_range
    )
    header = Progress(execution_id="e1", running=True, claims=(claim,)).to_json()
    with pytest.raises(MalformedReply):
        _client(header, blobs=[b"x"]).claim("s1", ClaimRequest())


def test_a_session_without_id_is_malformed() -> None:
    with pytest.raises(MalformedReply):
        _client({"session_id": 3}, 201).open_session()


def test_an_answer_that_failed_says_so() -> None:
    transport = FakeTransport(Reply(200, {}, []))
    HttpBrokerClient(transport).answer("c", ToolResult(attempt=2, error=ErrorInfo(type="E", message="m")), ())
    assert transport.requests[0][2]["error"]["type"] == "E"
