"""Both planes over real sockets, with a worker that does what the test says."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from broker.protocol import limits
from broker.protocol.frames import FRAME_CONTENT_TYPE, dump_frame
from broker.protocol.messages import ExecutionResult, Outcome
from broker.testing import FakeExecution, InProcessBroker, WorkerEnd
from broker.testing.fake_worker import ok
from tests.broker.conftest import TOOLS, Client

Scripts = dict[str, Callable[[FakeExecution], Any]]


def wait_for_interrupt(execution: FakeExecution) -> ExecutionResult:
    execution.interrupted.wait()
    return ExecutionResult(outcome=Outcome.INTERRUPTED)


def die(execution: FakeExecution) -> None:
    raise WorkerEnd("crashed(SIGSEGV)")


def call_once(execution: FakeExecution) -> ExecutionResult:
    return ok(execution.call_tool("search", "cats", limit=3).to_json())


def call_a_thousand(execution: FakeExecution) -> ExecutionResult:
    with ThreadPoolExecutor(1000) as pool:
        statuses = list(pool.map(lambda n: execution.call_tool("search", n), range(1000)))
    return ok(sum(status.value for status in statuses))


def garbage(execution: FakeExecution) -> None:
    execution.send_raw(b"\xff\xff\xff\xff" * 4)


def oversized(execution: FakeExecution) -> None:
    head = json.dumps({"type": "result", "blobs": [limits.MAX_TOOL_CALL_BYTES + 1]}).encode()
    execution.send_raw(struct.pack(">I", len(head)) + head)


def forge(execution: FakeExecution) -> ExecutionResult:
    execution.send_result(ok("forged"), execution_id="another")
    execution.send_result(ok("true"))
    execution.send_result(ok("late"))
    return ok("later still")


def flood(execution: FakeExecution) -> None:
    execution.send_raw(b"".join(map(bytes, dump_frame({"type": "noise"}))) * 100_000)


def echo_blobs(execution: FakeExecution) -> tuple[ExecutionResult, Any]:
    return ok({"$blob": [0, "bytes"]}), [bytes(blob)[::-1] for blob in execution.blobs]


SCRIPTS: Scripts = {
    "block": wait_for_interrupt,
    "die": die,
    "call": call_once,
    "thousand": call_a_thousand,
    "garbage": garbage,
    "oversized": oversized,
    "flood": flood,
    "forge": forge,
    "blobs": echo_blobs,
    "unknown": lambda execution: ok(execution.call_tool("rm").to_json()),
}


def script(execution: FakeExecution) -> Any:
    code = execution.header["code"]
    if code.startswith("print "):
        execution.print(code[6:])
        return ok()
    return SCRIPTS[code](execution)


@pytest.fixture(scope="module")
def box() -> Iterator[InProcessBroker]:
    with InProcessBroker(script, max_sessions=4) as box:
        yield box


@pytest.fixture
def client(box: InProcessBroker) -> Iterator[Client]:
    client = Client.open(box)
    yield client
    client.close()


def raw(path: Path, data: bytes) -> bytes:
    """Send bytes; return everything that comes back until the connection ends."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # the rest of what we sent was not read
            while piece := sock.recv(65536):
                answer += piece
    return answer


@contextlib.contextmanager
def waiting_request(client: Client) -> Iterator[socket.socket]:
    """Post an execution that blocks, on a connection of its own; enter once the broker waits for its end."""
    payload = {"execution_id": f"waiting-{client.session_id}", "code": "block", "tools": TOOLS}
    body = json.dumps(payload).encode()
    path = f"/v1/sessions/{client.session_id}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(client.box.host_socket))
        head = f"POST {path}/executions?wait_s=25 HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        while client.box.host.request("GET", path)[1]["state"] != "running":
            pass
        yield sock


def test_health_names_protocol_and_sandbox(box: InProcessBroker) -> None:
    status, health, _ = box.host.request("GET", "/v1/health")
    assert status == 200
    assert (health["protocol"], health["name"], health["state"]) == (1, "in-process", "ok")


def test_the_sockets_have_the_modes_of_the_document(box: InProcessBroker) -> None:
    modes = [stat.S_IMODE(os.stat(path).st_mode) for path in (box.host_socket, box.guest_socket)]
    assert modes == [0o600, 0o666]


def test_an_execution_gives_its_output_and_value(client: Client) -> None:
    progress = client.run("print héllo")
    assert progress.result is not None
    assert (progress.result.outcome, progress.result.output) == (Outcome.OK, "héllo")


def test_posting_the_same_execution_again_runs_nothing(client: Client) -> None:
    first = client.run("print once", execution_id="same")
    assert client.run("die", execution_id="same") == first


def test_without_waiting_the_end_is_fetched_later(client: Client) -> None:
    progress = client.run("block", wait_s=0)
    assert progress.running
    status, again, _ = client.box.host.request("GET", f"/v1/executions/{progress.execution_id}")
    assert (status, again["running"]) == (200, True)
    client.box.host.request("POST", f"/v1/executions/{progress.execution_id}/interrupt")
    _, ended, _ = client.box.host.request("GET", f"/v1/executions/{progress.execution_id}?wait_s=20")
    assert ended["result"]["outcome"] == "interrupted"


def test_a_tool_call_goes_there_and_back(client: Client) -> None:
    progress = client.run("call")
    [claim] = progress.claims
    assert (claim.tool, claim.args, claim.kwargs, claim.attempt) == ("search", ["cats"], {"limit": 3}, 1)
    assert client.answer(claim.call_id, {"found": 2}) == 200
    assert client.answer(claim.call_id, "twice") == 200
    _, ended, _ = client.claims(execution_id=progress.execution_id, wait_s=20)
    assert ended["result"]["value"]["value"] == {"found": 2}
    _, shown, _ = client.box.host.request("GET", f"/v1/tool-calls/{claim.call_id}")
    assert (shown["state"], shown["session_id"]) == ("done", client.session_id)


def test_a_claim_not_yet_started_can_be_started_and_renewed(client: Client) -> None:
    _, reply, _ = client.post("call", query="&start=0")
    [claim] = reply["claims"]
    path = f"/v1/tool-calls/{claim['call_id']}"
    assert client.box.host.request("GET", path)[1]["state"] == "leased"
    assert client.box.host.request("POST", path + "/heartbeat", {"attempt": 1, "lease_s": 9})[0] == 200
    assert client.box.host.request("POST", path + "/heartbeat", {"attempt": 2})[1]["error"]["code"] == "lease_expired"
    assert client.box.host.request("POST", path + "/start", {"attempt": 2})[1]["error"]["code"] == "lease_expired"
    assert client.box.host.request("POST", path + "/start", {"attempt": 1})[1]["state"] == "started"
    assert client.answer(claim["call_id"], 1) == 200


def test_a_lost_lease_of_a_started_call_wakes_its_caller_as_unknown(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ATTACH_GRACE_S", 0.05)
    progress = client.run("call", query="&lease_s=0.05")
    _, ended, _ = client.claims(execution_id=progress.execution_id, wait_s=20, limit=0)
    assert ended["result"]["value"]["state"] == "unknown"
    assert ended["result"]["value"]["error"]["type"] == "ToolOutcomeUnknown"
    assert client.answer(progress.claims[0].call_id, 1) == 410


def test_the_callers_of_an_interrupted_execution_are_answered(client: Client) -> None:
    progress = client.run("call")
    client.box.host.request("POST", f"/v1/executions/{progress.execution_id}/interrupt")
    _, ended, _ = client.claims(execution_id=progress.execution_id, wait_s=20)
    assert ended["result"]["outcome"] == "ok"  # this script ended by itself once its call was cancelled
    assert ended["result"]["value"]["state"] == "cancelled"
    assert client.answer(progress.claims[0].call_id, 1) == 410


def test_an_unknown_tool_is_refused_with_the_names(client: Client) -> None:
    progress = client.run("unknown")
    assert progress.result is not None
    error = progress.result.value["error"]
    assert error["type"] == "unknown_tool"
    assert "search" in error["message"]


def test_a_thousand_blocked_callers_starve_nobody(client: Client) -> None:
    progress = client.run("thousand", query="&limit=0", wait_s=0)
    answered, slowest_s = 0, 0.0
    while answered < 1000:
        _, reply, _ = client.claims(limit=100, wait_s=20, execution_id=progress.execution_id)
        before = time.perf_counter()
        assert client.box.host.request("GET", "/v1/health")[0] == 200
        slowest_s = max(slowest_s, time.perf_counter() - before)
        for claim in reply["claims"]:
            assert client.answer(claim["call_id"], claim["args"][0]) == 200
        answered += len(reply["claims"])
    _, ended, _ = client.claims(execution_id=progress.execution_id, wait_s=20)
    assert ended["result"]["value"] == sum(range(1000))
    assert slowest_s < 2.0


def test_blobs_go_both_ways_untouched(client: Client) -> None:
    payload = os.urandom(300_000)
    status, reply, blobs = client.post("blobs", blobs=[payload], variables={"data": {"$blob": [0, "bytes"]}})
    assert status == 200
    assert reply["result"]["value"] == {"$blob": [0, "bytes"]}
    assert [bytes(blob) for blob in blobs] == [payload[::-1]]


def test_the_blobs_of_claims_are_told_apart(client: Client) -> None:
    box = client.box
    progress = client.run("block", wait_s=0)
    for key in ("one", "two"):
        request = {"key": key, "execution_id": progress.execution_id, "tool": "search", "wait_s": 0}
        raw_parts = [f"{key}-a".encode(), f"{key}-b".encode()]
        assert (
            box.guest.request("POST", "/v1/tool-calls", {**request, "args": [{"$blob": [1, "str"]}]}, raw_parts)[0]
            == 200
        )
    _, reply, blobs = client.claims(wait_s=20)
    found = [[bytes(blob) for blob in blobs[slice(*claim["blob_range"])]] for claim in reply["claims"]]
    assert found == [[b"one-a", b"one-b"], [b"two-a", b"two-b"]]
    answer = os.urandom(100_000)
    call_id = reply["claims"][0]["call_id"]
    assert client.answer(call_id, {"$blob": [0, "bytes"]}, [answer]) == 200
    _, status, back = box.guest.request("GET", f"/v1/tool-calls/{call_id}?wait_s=20")
    assert (status["state"], bytes(back[0])) == ("done", answer)
    box.host.request("POST", f"/v1/executions/{progress.execution_id}/interrupt")


def test_the_same_key_twice_is_one_call(client: Client) -> None:
    progress = client.run("block", wait_s=0)
    request = {"key": "k", "execution_id": progress.execution_id, "tool": "search", "wait_s": 0}
    ids = {client.box.guest.request("POST", "/v1/tool-calls", request)[1]["call_id"] for _ in range(3)}
    assert len(ids) == 1
    client.box.host.request("POST", f"/v1/executions/{progress.execution_id}/interrupt")


@pytest.mark.parametrize("attack", ["garbage", "oversized", "flood"])
def test_bytes_that_are_no_frame_end_the_session_as_protocol(client: Client, attack: str) -> None:
    progress = client.run(attack)
    assert progress.result is not None
    assert (progress.result.outcome, progress.result.session_lost) == (Outcome.WORKER_DIED, "protocol")
    status, reply, _ = client.post("print more")
    assert (status, reply["error"]["code"], reply["error"]["reason"]) == (410, "session_lost", "protocol")


def test_only_the_first_frame_of_the_running_execution_counts(client: Client) -> None:
    progress = client.run("forge")
    assert progress.result is not None
    assert progress.result.value == "true"
    assert client.run("print next").result is not None


def test_a_worker_that_dies_ends_the_execution_at_once(client: Client) -> None:
    progress = client.run("die")
    assert progress.result is not None
    assert (progress.result.outcome, progress.result.session_lost) == (Outcome.WORKER_DIED, "crashed(SIGSEGV)")
    _, shown, _ = client.box.host.request("GET", f"/v1/sessions/{client.session_id}")
    assert (shown["state"], shown["lost"]) == ("lost", "crashed(SIGSEGV)")


def test_closing_a_session_answers_whoever_waits(box: InProcessBroker) -> None:
    client = Client.open(box)
    with waiting_request(client) as waiting:
        assert client.close() == 200
        assert b'"session_lost":"shutdown"' in waiting.recv(65536)
    assert client.close() == 404


def test_the_last_slot_taken_is_a_typed_refusal_and_comes_back(box: InProcessBroker) -> None:
    clients = [Client.open(box) for _ in range(4)]
    status, reply, _ = box.host.request("POST", "/v1/sessions")
    assert (status, reply["error"]["code"]) == (429, "too_many_sessions")
    assert clients.pop().close() == 200
    clients.append(Client.open(box))
    assert {session["state"] for session in box.host.request("GET", "/v1/sessions")[1]["sessions"]} == {"idle"}
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    ("method", "path", "payload", "status", "code"),
    [
        ("GET", "/", None, 404, "unknown_route"),
        ("GET", "/v1/../v1/health", None, 404, "unknown_route"),
        ("DELETE", "/v1/health", None, 405, "method_not_allowed"),
        ("OPTIONS", "/v1/health", None, 405, "method_not_allowed"),
        ("GET", "/v1/sessions/nobody", None, 404, "unknown_session"),
        ("GET", "/v1/executions/nothing", None, 404, "unknown_execution"),
        ("GET", "/v1/tool-calls/nothing", None, 404, "unknown_call"),
        ("POST", "/v1/tool-calls/nothing/result", {"attempt": 1}, 404, "unknown_call"),
        ("POST", "/v1/sessions/nobody/executions", {}, 404, "unknown_session"),
        ("GET", "/v1/executions/nothing?wait_s=soon", None, 404, "unknown_execution"),
    ],
)
def test_what_is_not_there_is_a_typed_error(
    box: InProcessBroker, method: str, path: str, payload: Any, status: int, code: str
) -> None:
    answered, reply, _ = box.host.request(method, path, payload)
    assert (answered, reply["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"code": "1"}, "execution_id"),
        ({"execution_id": "e", "code": 1}, "code"),
        ({"execution_id": "e" * 65, "code": ""}, "execution_id"),
        ({"execution_id": "e", "code": "", "timeout_s": 0}, "timeout_s"),
        ({"execution_id": "e", "code": "", "timeout_s": True}, "timeout_s"),
        ({"execution_id": "e", "code": "", "tools": [{"name": "not a name"}]}, "identifier"),
        ({"execution_id": "e", "code": "", "variables": []}, "variables"),
    ],
)
def test_a_field_that_cannot_be_is_named(client: Client, payload: dict[str, Any], field: str) -> None:
    status, reply, _ = client.box.host.request("POST", f"/v1/sessions/{client.session_id}/executions", payload)
    assert (status, reply["error"]["code"]) == (400, "bad_request")
    assert field in reply["error"]["message"]


def test_a_query_that_cannot_be_is_named(client: Client) -> None:
    for query in ("&limit=-1", "&lease_s=nan", "&lease_s=x", "&start=maybe"):
        status, reply, _ = client.post("print x", query=query)
        assert (status, reply["error"]["code"]) == (400, "bad_request"), query


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"key": NaN}',
        b'{"key": 1e999}',
        b'{"key": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
        b"\xff\xfe",
    ],
)
def test_bodies_that_are_no_json_object_are_refused(client: Client, body: bytes) -> None:
    request = b"POST /v1/tool-calls HTTP/1.1\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    answer = raw(client.box.guest_socket, request + body)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"bad_request"' in answer


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0\0\0",
        b"\xff\xff\xff\xff{}",
        b"\0\0\0\x02[]",
        b"".join(map(bytes, dump_frame({}, [b"abc"])))[:-1],
        b"".join(map(bytes, dump_frame({}, [b"abc"]))) + b"x",
        b"\0\0\0\x0e" + b'{"blobs":[-1]}',
    ],
)
def test_broken_frames_are_refused(client: Client, frame: bytes) -> None:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(client.box.guest_socket))
    connection.request("POST", "/v1/tool-calls", frame, {"Content-Type": FRAME_CONTENT_TYPE})
    response = connection.getresponse()
    assert response.status == 400
    assert json.loads(response.read())["error"]["code"] == "bad_request"
    connection.close()


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v1/health HTTP/9.9\r\n\r\n", 400),
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 2 + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(100)) + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", 400),
        (b"POST /v1/tool-calls HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/tool-calls HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /v1/tool-calls HTTP/1.1\r\nConnection: close\r\n\r\n", 411),
        (b"POST /v1/tool-calls HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n", 411),
        (b"POST /v1/tool-calls HTTP/1.1\r\nContent-Length: 999999999999\r\nConnection: close\r\n\r\n", 413),
        (b"POST /v1/tool-calls HTTP/1.1\r\nContent-Length: 10\r\nConnection: close\r\n\r\n{}", 400),
    ],
)
def test_malformed_http_is_answered_in_json_and_hurts_nobody(client: Client, request_head: bytes, status: int) -> None:
    answer = raw(client.box.guest_socket, request_head)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert "error" in json.loads(body)
    assert client.box.host.request("GET", "/v1/health")[0] == 200


def test_a_reply_leaves_in_one_piece_and_the_connection_is_kept(box: InProcessBroker) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(box.host_socket))
        for _ in range(3):
            sock.sendall(b"GET /v1/health HTTP/1.1\r\n\r\n")
            head, _, body = sock.recv(65536).partition(b"\r\n\r\n")
            assert f"Content-Length: {len(body)}".encode() in head
            assert json.loads(body)["protocol"] == 1


def test_a_host_that_hung_up_while_it_waited_gets_no_calls(client: Client) -> None:
    with waiting_request(client):
        pass
    execution_id = f"waiting-{client.session_id}"
    request = {"key": "k", "execution_id": execution_id, "tool": "search", "wait_s": 0}
    assert client.box.guest.request("POST", "/v1/tool-calls", request)[0] == 200
    _, reply, _ = client.claims(wait_s=20, execution_id=execution_id)
    assert [claim["attempt"] for claim in reply["claims"]] == [1]
    client.box.host.request("POST", f"/v1/executions/{execution_id}/interrupt")


def test_a_stranger_on_the_guests_socket_is_nobody() -> None:
    with InProcessBroker(script) as box:
        assert box.guest.request("POST", "/v1/tool-calls", {})[1]["error"]["code"] == "unknown_session"
        assert box.guest.request("GET", "/v1/health")[1]["error"]["code"] == "unknown_route"
        assert box.guest.request("GET", "/v1/sessions")[1]["error"]["code"] == "unknown_route"


def test_without_a_host_the_sandbox_ends_itself() -> None:
    with InProcessBroker(script, linger_s=0.2) as box:
        Client.open(box)
        assert not box.ended
        box.host.close()
        assert box.wait_ended(20)
        assert not box.host_socket.exists()


def test_a_connected_host_keeps_the_sandbox_alive() -> None:
    with InProcessBroker(script, linger_s=0.05) as box:
        client = Client.open(box)
        progress = client.run("block", wait_s=0)
        _, reply, _ = client.claims(wait_s=0.3, execution_id=progress.execution_id)
        assert reply["running"]
        assert not box.ended


def test_nothing_of_the_code_is_in_the_log(client: Client) -> None:
    client.run("print SECRETWORD", variables={"v": "SECRETWORD"})
    assert "SECRETWORD" not in client.box.log_path.read_text()
    for line in client.box.log_path.read_text().splitlines():
        assert {"at", "event", "from"} <= set(json.loads(line))
