"""A session changes hands: who may speak, and what becomes of the calls that the old client had."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from broker.errors import CallGone, LeaseExpired
from broker.protocol import limits
from broker.protocol.messages import CallState, ExecutionResult, ToolCallRequest, ToolResult, Verdict
from broker.testing import FakeClock, FakeExecution, InProcessBroker, WorkerEnd
from broker.testing.fake_worker import ok
from broker.tool_calls import ToolCall, ToolCallQueue
from tests.broker.conftest import Client


def asked(key: str) -> ToolCallRequest:
    return ToolCallRequest(key=key, execution_id="e", tool="search")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def queue(clock: FakeClock) -> ToolCallQueue:
    return ToolCallQueue(clock=clock)


def started(queue: ToolCallQueue) -> ToolCall:
    call = queue.submit(asked("started"))
    queue.claim(limit=1, lease_s=10, start=True)
    return call


def test_a_new_client_gets_the_leased_calls_in_their_order_and_is_told_of_the_started_ones(
    queue: ToolCallQueue,
) -> None:
    ran = started(queue)
    leased = [queue.submit(asked(key)) for key in "ab"]
    queue.claim(limit=2, lease_s=10)
    queued = queue.submit(asked("c"))
    assert queue.take_over() == [ran]
    assert queue.claim(limit=9, lease_s=10) == [*leased, queued]


def test_a_requeued_call_keeps_its_key_and_counts_another_attempt(queue: ToolCallQueue) -> None:
    call = started(queue)
    key = call.key
    queue.take_over()
    queue.resolve(call.call_id, 1, Verdict.QUEUED)
    assert queue.resolve(call.call_id, 1, Verdict.QUEUED) is call  # a word said twice is said once
    assert queue.claim(limit=1, lease_s=10) == [call]
    assert (call.attempt, call.key) == (2, key)
    with pytest.raises(LeaseExpired):
        queue.finish(call.call_id, ToolResult(attempt=1, value="of the first attempt"))


def test_a_call_given_up_is_unknown_for_good(queue: ToolCallQueue) -> None:
    call = started(queue)
    queue.take_over()
    queue.resolve(call.call_id, 1, Verdict.UNKNOWN)
    queue.resolve(call.call_id, 1, Verdict.UNKNOWN)
    assert call.state is CallState.UNKNOWN
    with pytest.raises(CallGone):
        queue.finish(call.call_id, ToolResult(attempt=1, value="late"))
    with pytest.raises(CallGone):
        queue.resolve(call.call_id, 1, Verdict.QUEUED)


def test_a_recorded_result_is_taken_from_the_new_client(queue: ToolCallQueue) -> None:
    call = started(queue)
    queue.take_over()
    queue.finish(call.call_id, ToolResult(attempt=1, value="recorded"))
    assert (call.state, call.value) == (CallState.DONE, "recorded")
    with pytest.raises(LeaseExpired):
        queue.resolve(call.call_id, 1, Verdict.QUEUED)


def test_a_call_that_the_new_client_says_nothing_of_is_given_up(queue: ToolCallQueue, clock: FakeClock) -> None:
    call = started(queue)
    queue.take_over()
    assert queue.next_lease_end() is not None
    clock.advance(limits.ATTACH_GRACE_S)
    queue.expire_leases()
    assert call.state is CallState.UNKNOWN


# Over HTTP.


def call_search(execution: FakeExecution) -> ExecutionResult:
    return ok(execution.call_tool("search").to_json())


@pytest.fixture
def client() -> Iterator[Client]:
    with InProcessBroker(call_search) as box:
        yield Client.open(box)


def attach(client: Client, **body: Any) -> tuple[int, dict[str, Any]]:
    status, reply, _ = client.box.host.request("POST", f"/v1/sessions/{client.session_id}/attach", body)
    return status, reply


def test_whoever_attaches_is_told_what_runs_and_what_was_started(client: Client) -> None:
    [claim] = client.run("search()").claims
    status, reply = attach(client)
    assert (status, reply["epoch"], reply["running"]) == (200, 2, True)
    assert reply["execution_id"] == claim.execution_id
    [call] = reply["started"]
    assert (call["call_id"], call["attempt"], call["tool"], call["idempotent"]) == (claim.call_id, 1, "search", False)
    assert call["key"] == claim.key


def test_what_was_declared_idempotent_is_said_to_be(client: Client) -> None:
    client.run("search()", tools=[{"name": "search", "parameters": None, "idempotent": True}])
    assert attach(client)[1]["started"][0]["idempotent"] is True


def requests_of(session_id: str, call_id: str, execution_id: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    return {
        "execute": ("POST", f"/v1/sessions/{session_id}/executions", {"execution_id": "other", "code": "1"}),
        "claim": ("POST", f"/v1/sessions/{session_id}/claims", {}),
        "start": ("POST", f"/v1/tool-calls/{call_id}/start", {"attempt": 1}),
        "heartbeat": ("POST", f"/v1/tool-calls/{call_id}/heartbeat", {"attempt": 1}),
        "result": ("POST", f"/v1/tool-calls/{call_id}/result", {"attempt": 1, "value": "forged"}),
        "resolve": ("POST", f"/v1/tool-calls/{call_id}/resolve", {"attempt": 1, "state": "unknown"}),
        "interrupt": ("POST", f"/v1/executions/{execution_id}/interrupt", {}),
        "close": ("DELETE", f"/v1/sessions/{session_id}", {}),
        "attach": ("POST", f"/v1/sessions/{session_id}/attach", {"epoch": 1}),
    }


@pytest.mark.parametrize("what", list(requests_of("", "", "")))
@pytest.mark.parametrize("epoch", ["", "?epoch=1", "?epoch=3"])
def test_a_client_of_another_epoch_is_fenced_and_changes_nothing(client: Client, what: str, epoch: str) -> None:
    [claim] = client.run("search()").claims
    attach(client)
    method, path, body = requests_of(client.session_id, claim.call_id, claim.execution_id)[what]
    status, reply, _ = client.box.host.request(method, path + epoch, body)
    assert (status, reply["error"]["code"]) == (409, "fenced")
    _, call, _ = client.box.host.request("GET", f"/v1/tool-calls/{claim.call_id}")
    assert (call["state"], call["attempt"]) == ("started", 1)
    _, session, _ = client.box.host.request("GET", f"/v1/sessions/{client.session_id}")
    assert (session["state"], session["epoch"]) == ("running", 2)


def test_a_long_poll_of_the_old_client_is_cut_short_and_takes_no_call(client: Client) -> None:
    [claim] = client.run("search()").claims
    answers: list[int] = []

    def poll() -> None:
        answers.append(client.claims(wait_s=20, execution_id=claim.execution_id)[0])

    waiting = threading.Thread(target=poll)
    waiting.start()
    attach(client)
    waiting.join(10)
    assert answers == [409]


def test_the_new_client_carries_the_execution_to_its_end_and_its_reply_is_stored(client: Client) -> None:
    [claim] = client.run("search()").claims
    attach(client)
    request = client.box.host.request
    body = {"attempt": 1, "value": "recorded"}
    assert request("POST", f"/v1/tool-calls/{claim.call_id}/result?epoch=2", body)[0] == 200
    path = f"/v1/executions/{claim.execution_id}?wait_s=10"
    first, again = request("GET", path)[1], request("GET", path)[1]
    assert first["result"]["value"]["value"] == "recorded"
    assert again == first
    assert attach(client, epoch=2)[1]["execution_id"] == claim.execution_id


def test_of_two_that_attach_at_once_one_wins(client: Client) -> None:
    assert [attach(client, epoch=1)[0], attach(client, epoch=1)[0]] == [200, 409]


def test_a_session_is_found_by_its_name_which_no_other_living_one_has() -> None:
    with InProcessBroker(lambda execution: ok()) as box:
        opened = box.host.request("POST", "/v1/sessions", {"name": "novel"})
        assert (opened[0], opened[1]["name"]) == (201, "novel")
        status, reply, _ = box.host.request("POST", "/v1/sessions", {"name": "novel"})
        assert (status, reply["error"]["code"]) == (409, "session_name_taken")
        box.host.request("DELETE", f"/v1/sessions/{opened[1]['session_id']}")
        assert box.host.request("POST", "/v1/sessions", {"name": "novel"})[0] == 201


def test_a_lost_session_cannot_be_attached_to() -> None:
    def die(execution: FakeExecution) -> ExecutionResult:
        raise WorkerEnd("oom")

    with InProcessBroker(die) as box:
        client = Client.open(box)
        client.run("1")
        status, reply = attach(client)
        assert (status, reply["error"]["reason"]) == (410, "oom")
