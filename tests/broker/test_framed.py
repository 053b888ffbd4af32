"""Claims about the framed form: the same requests and errors as over HTTP, on one upgraded connection."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent
import pytest

from broker.framed import Cancel, FramedConnection, Request
from broker.logs import Log
from broker.protocol import limits
from broker.protocol.blob_file import BlobFile
from broker.protocol.frames import FILES_UPGRADE, FRAMED_UPGRADE, Blob, FrameAssembler, dump_frame
from broker.protocol.messages import Progress
from broker.testing import InProcessBroker

UPGRADE = f"GET /v1/frames HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {FRAMED_UPGRADE}\r\n\r\n"
FILES = UPGRADE.replace(FRAMED_UPGRADE, FILES_UPGRADE)


class FramedClient:
    """One upgraded connection."""

    upgrade = UPGRADE

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.sock.sendall(self.upgrade.encode())
        assert self.sock.recv(4096).startswith(b"HTTP/1.1 101 ")
        self.frames = FrameAssembler()

    def send(self, request: str, body: dict[str, Any], blobs: Sequence[Blob] = ()) -> None:
        self.sock.sendall(b"".join(dump_frame({"request": request, "body": body}, blobs)))

    def receive(self) -> tuple[int, dict[str, Any], list[bytes]]:
        while (frame := self.frames.next()) is None:
            data = self.sock.recv(65536)
            assert data, "the connection was closed"
            self.frames.add(data)
        header, blobs = frame
        return header["status"], header["body"], [bytes(blob) for blob in blobs]

    def ask(self, request: str, body: dict[str, Any], blobs: Sequence[Blob] = ()) -> tuple[int, dict[str, Any], Any]:
        self.send(request, body, blobs)
        return self.receive()


@pytest.fixture
def box() -> Iterator[InProcessBroker]:
    with InProcessBroker() as running:
        yield running


@pytest.fixture
def session(box: InProcessBroker) -> str:
    _, opened, _ = box.host.request("POST", "/v1/sessions", {})
    return str(opened["session_id"])


@pytest.fixture
def client(box: InProcessBroker) -> Iterator[FramedClient]:
    framed = FramedClient(box.host_socket)
    yield framed
    framed.sock.close()


def execution(number: int, code: str, **more: Any) -> dict[str, Any]:
    return {"execution_id": f"e{number}", "code": code, **more}


def test_executions_tool_calls_and_answers_work_in_frames(client: FramedClient, session: str) -> None:
    tools = [{"name": "add", "parameters": None}]
    path = f"POST /v1/sessions/{session}/executions?wait_s=20"
    status, progress, _ = client.ask(path, execution(1, "add(1, b=2)", tools=tools))
    [claim] = progress["claims"]
    assert (status, claim["tool"], claim["args"], claim["kwargs"]) == (200, "add", [1], {"b": 2})
    answer = {"attempt": claim["attempt"], "value": 3}
    assert client.ask(f"POST /v1/tool-calls/{claim['call_id']}/result", answer)[1]["state"] == "done"
    status, progress, _ = client.ask(f"POST /v1/sessions/{session}/claims", {"wait_s": 20, "execution_id": "e1"})
    assert (status, progress["result"]["value"]) == (200, 3)


def test_blobs_travel_both_ways(client: FramedClient, session: str) -> None:
    text = b"x" * 300_000
    body = execution(1, "text + 'y'", variables={"text": {"$blob": [0, "str"]}})
    _, progress, blobs = client.ask(f"POST /v1/sessions/{session}/executions?wait_s=20", body, [text])
    assert progress["result"]["value"] == {"$blob": [0, "str"]}
    assert blobs == [text + b"y"]


def test_http_and_frames_speak_of_the_same_session(box: InProcessBroker, client: FramedClient, session: str) -> None:
    client.ask(f"POST /v1/sessions/{session}/executions?wait_s=20", execution(1, "kept = 41"))
    path = f"/v1/sessions/{session}/executions?wait_s=20"
    _, progress, _ = box.host.request("POST", path, execution(2, "kept + 1"))
    assert progress["result"]["value"] == 42


@pytest.mark.parametrize(
    ("request_line", "body", "status", "code"),
    [
        ("POST /v1/sessions/none/executions", {"execution_id": "e", "code": ""}, 404, "unknown_session"),
        ("POST /v1/sessions/{session}/executions", {"code": ""}, 400, "bad_request"),
        ("POST /v1/sessions/{session}/executions?wait_s=x", {"execution_id": "e", "code": ""}, 400, "bad_request"),
        ("POST /v1/sessions/{session}/executions?epoch=7", {"execution_id": "e", "code": ""}, 409, "fenced"),
        ("POST /v1/sessions/{session}/claims", {"limit": "many"}, 400, "bad_request"),
        ("POST /v1/tool-calls/none/result", {"attempt": 1}, 404, "unknown_call"),
        ("POST /v1/sessions", {}, 404, "unknown_route"),
        ("POST /v2/sessions/{session}/claims", {}, 404, "unknown_route"),
        ("DELETE /v1/sessions/{session}", {}, 404, "unknown_route"),
        ("POST /v1/a/b/c/d/e", {}, 404, "unknown_route"),
        ("nonsense", {}, 404, "unknown_route"),
        ("", {}, 404, "unknown_route"),
    ],
)
def test_errors_are_those_of_http_and_the_connection_lives(
    client: FramedClient, session: str, request_line: str, body: dict[str, Any], status: int, code: str
) -> None:
    got, answer, _ = client.ask(request_line.format(session=session), body)
    assert (got, answer["error"]["code"]) == (status, code)
    _, progress, _ = client.ask(f"POST /v1/sessions/{session}/executions?wait_s=20", execution(9, "1 + 1"))
    assert progress["result"]["value"] == 2


@pytest.mark.parametrize(
    "junk",
    [
        struct.pack(">I", 0xFFFFFFFF) + b"{}",
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 5) + b"hello",
        struct.pack(">I", 15) + b'{"blobs": [-1]}',
        b"GET /v1/health HTTP/1.1\r\n\r\n",
    ],
    ids=["huge header", "no object", "no JSON", "negative blob", "HTTP"],
)
def test_bytes_that_are_no_frame_end_the_connection_with_an_answer(
    box: InProcessBroker, client: FramedClient, junk: bytes
) -> None:
    client.sock.sendall(junk)
    status, answer, _ = client.receive()
    assert (status, answer["error"]["code"]) == (400, "bad_request")
    assert client.sock.recv(1) == b""
    assert box.host.request("GET", "/v1/health")[0] == 200


def test_requests_sent_in_a_row_are_answered_in_order(client: FramedClient, session: str) -> None:
    for number in range(20):
        client.send(f"POST /v1/sessions/{session}/executions?wait_s=20", execution(number, str(number)))
    assert [client.receive()[1]["result"]["value"] for _ in range(20)] == list(range(20))


def test_many_requests_in_one_write_are_answered_each_in_its_turn(client: FramedClient) -> None:
    request = {"request": "POST /v1/tool-calls/none/result", "body": {"attempt": 1}}
    wrong = {"request": "POST /v1/nothing", "body": {}}
    sent = [wrong if number % 10 == 3 else request for number in range(100)]
    client.sock.sendall(b"".join(b"".join(dump_frame(each)) for each in sent))
    codes = [client.receive()[1]["error"]["code"] for _ in sent]
    assert codes == ["unknown_route" if each is wrong else "unknown_call" for each in sent]


def test_what_stood_before_bytes_that_are_no_frame_is_answered(client: FramedClient) -> None:
    good = b"".join(dump_frame({"request": "POST /v1/tool-calls/none/result", "body": {"attempt": 1}}))
    client.sock.sendall(good * 3 + b"\xff\xff\xff\xff and so on")
    assert [client.receive()[0] for _ in range(4)] == [404, 404, 404, 400]
    assert client.sock.recv(1) == b""


def test_an_answer_is_given_to_the_code_and_to_the_host_where_many_are_sent_at_once(
    box: InProcessBroker, session: str
) -> None:
    waiting, answering = FramedClient(box.host_socket), FramedClient(box.host_socket)
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(20) as pool: found = list(pool.map(add, range(20)))\n"
        "found"
    )
    body = execution(1, code, tools=[{"name": "add", "parameters": None}])
    waiting.send(f"POST /v1/sessions/{session}/executions?wait_s=20&stream=1&limit=20", body)
    claims: list[dict[str, Any]] = []
    while len(claims) < 20:
        claims += waiting.receive()[1]["claims"]
    answers = [
        {"request": f"POST /v1/tool-calls/{each['call_id']}/result", "body": {"attempt": 1, "value": each["args"][0]}}
        for each in claims
    ]
    answering.sock.sendall(b"".join(b"".join(dump_frame(each)) for each in answers))
    assert [answering.receive()[1]["call_id"] for _ in answers] == [each["call_id"] for each in claims]
    assert waiting.receive()[1]["result"]["value"] == list(range(20))
    waiting.sock.close()
    answering.sock.close()


def test_without_an_upgrade_the_path_says_what_it_wants(box: InProcessBroker) -> None:
    status, answer, _ = box.host.request("GET", "/v1/frames")
    assert (status, answer["error"]["code"]) == (426, "upgrade_required")


def test_framed_requests_of_generated_code_are_small(box: InProcessBroker, session: str) -> None:
    code = f"""
import socket, struct
sock = socket.socket(socket.AF_UNIX)
sock.connect({str(box.guest_socket)!r})
sock.sendall({UPGRADE.encode()!r})
assert b" 101 " in sock.recv(4096)
header = b'{{"request": "POST /v1/tool-calls", "blobs": [{limits.MAX_GUEST_FRAME_BYTES + 1}]}}'
sock.sendall(struct.pack(">I", len(header)) + header)
sock.recv(4096)
"""
    path = f"/v1/sessions/{session}/executions?wait_s=20"
    _, progress, _ = box.host.request("POST", path, execution(1, code))
    assert "blobs of more than" in progress["result"]["display"]


ASK_TWICE = """
import threading
answers = []
threads = [threading.Thread(target=lambda n=n: answers.append(add(n, n))) for n in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sorted(answers)
"""


def test_one_request_brings_all_claims_of_an_execution_as_many_at_once_as_it_says(
    box: InProcessBroker, client: FramedClient, session: str
) -> None:
    tools = [{"name": "add", "parameters": None}]
    client.send(
        f"POST /v1/sessions/{session}/executions?wait_s=20&stream=1&limit=1", execution(1, ASK_TWICE, tools=tools)
    )
    other = FramedClient(box.host_socket)
    for _ in range(3):
        status, progress, _ = client.receive()
        assert (status, progress["running"], progress["more"]) == (200, True, True)
        [claim] = progress["claims"]  # never two, as long as one is held
        answer = {"attempt": claim["attempt"], "value": sum(claim["args"])}
        assert other.ask(f"POST /v1/tool-calls/{claim['call_id']}/result", answer)[0] == 200
    status, progress, _ = client.receive()
    assert (status, progress["result"]["value"], progress.get("more")) == (200, [0, 2, 4], None)
    other.sock.close()


def test_an_answer_brings_the_next_call_along(box: InProcessBroker, client: FramedClient, session: str) -> None:
    tools = [{"name": "add", "parameters": None}]
    client.send(f"POST /v1/sessions/{session}/executions?wait_s=20&limit=1", execution(1, ASK_TWICE, tools=tools))
    [claim] = client.receive()[1]["claims"]
    queued = f"/v1/sessions/{session}/claims"
    # Until the others have called too: nothing is claimed here.
    while not all_queued(box, session, 2):
        box.host.request("POST", queued, {"wait_s": 0.01, "limit": 0, "execution_id": "e1"})
    seen = [claim]
    while True:
        claim = seen[-1]
        answer = {"attempt": claim["attempt"], "value": sum(claim["args"])}
        status, reply, _ = client.ask(f"POST /v1/tool-calls/{claim['call_id']}/result?claim=1", answer)
        assert (status, reply["state"]) == (200, "done")
        if "claims" not in reply:
            break
        seen += reply["claims"]
    assert len({claim["call_id"] for claim in seen}) == 3
    _, progress, _ = client.ask(f"POST /v1/sessions/{session}/claims", {"wait_s": 20, "execution_id": "e1"})
    assert progress["result"]["value"] == [0, 2, 4]


def all_queued(box: InProcessBroker, session: str, count: int) -> bool:
    return bool(box.daemon.sessions[session].core.tool_calls.claimable == count)


def test_a_stream_ends_with_its_time_and_is_taken_up_again(client: FramedClient, session: str) -> None:
    tools = [{"name": "add", "parameters": None}]
    path = f"POST /v1/sessions/{session}/executions?wait_s=0.05&stream=1"
    client.send(path, execution(1, "add(1, 2)", tools=tools))
    replies = [client.receive()]
    while replies[-1][1].get("more"):
        replies.append(client.receive())
    assert replies[-1][1]["running"]
    claims = [claim for _, progress, _ in replies for claim in progress["claims"]]
    again = f"POST /v1/sessions/{session}/claims?stream=1"
    while not claims:
        claims = client.ask(again, {"wait_s": 0.05, "execution_id": "e1"})[1]["claims"]
    answer = {"attempt": claims[0]["attempt"], "value": 3}
    assert client.ask(f"POST /v1/tool-calls/{claims[0]['call_id']}/result", answer)[0] == 200
    assert client.ask(again, {"wait_s": 20, "execution_id": "e1"})[1]["result"]["value"] == 3


def test_a_streams_holder_who_was_replaced_is_told_so(box: InProcessBroker, client: FramedClient, session: str) -> None:
    tools = [{"name": "add", "parameters": None}]
    client.send(f"POST /v1/sessions/{session}/executions?wait_s=20&stream=1", execution(1, "add(1, 2)", tools=tools))
    assert client.receive()[1]["more"]
    assert box.host.request("POST", f"/v1/sessions/{session}/attach", {"epoch": 1})[0] == 200
    status, answer, _ = client.receive()
    assert (status, answer["error"]["code"]) == (409, "fenced")


def test_no_call_is_handed_to_a_client_that_is_gone(box: InProcessBroker, session: str) -> None:
    tools = [{"name": "add", "parameters": None}]
    gone = FramedClient(box.host_socket)
    code = "import os, time\nwhile not os.path.exists(flag): time.sleep(0.005)\nadd(1, 2)"
    flag = str(box.host_socket.parent / "flag")
    body = execution(1, code, tools=tools, variables={"flag": flag})
    gone.send(f"POST /v1/sessions/{session}/executions?wait_s=20&stream=1", body)
    # Posted anew, the execution is known: so the first request has arrived.
    path = f"/v1/sessions/{session}/claims"
    while box.host.request("POST", path, {"wait_s": 0, "limit": 0, "execution_id": "e1"})[0] == 404:
        pass
    gone.sock.close()
    open(flag, "w").close()
    _, progress, _ = box.host.request("POST", path, {"wait_s": 20, "execution_id": "e1"})
    [claim] = progress["claims"]
    assert claim["attempt"] == 1


class FilesClient(FramedClient):
    """One connection on which blobs may come in a file."""

    upgrade = FILES

    def ask_with(self, fds: list[int], request: str, body: dict[str, Any], lengths: list[int]) -> Any:
        header = {"request": request, "body": body, "file": True, "blobs": lengths}
        socket.send_fds(self.sock, [b"".join(dump_frame(header))], fds)
        return self.receive()


def variable(text: str) -> dict[str, Any]:
    return execution(len(text), "len(text), text[-1]", variables={"text": {"$blob": [0, "str"]}})


def test_variables_may_come_in_a_file(box: InProcessBroker, session: str) -> None:
    client = FilesClient(box.host_socket)
    path = f"POST /v1/sessions/{session}/executions?wait_s=20"
    for size in (1_000, 3_000_000):
        file = BlobFile.of(["x" * size])
        _, progress, _ = client.ask_with([file.fd], path, variable("x" * size), file.lengths)
        assert progress["result"]["value"] == [size, "x"]
        file.close()
    assert client.ask(path, execution(1, "text[:2]"))[1]["result"]["value"] == "xx"
    client.sock.close()


@pytest.mark.parametrize("kind", ["none", "two", "short", "unsealed", "pipe"])
def test_a_file_that_is_not_what_it_should_be_is_refused(box: InProcessBroker, session: str, kind: str) -> None:
    client = FilesClient(box.host_socket)
    path = f"POST /v1/sessions/{session}/executions?wait_s=20"
    file, unsealed, (reading, writing) = BlobFile.of([b"x" * 100]), os.memfd_create("test"), os.pipe()
    os.write(unsealed, b"x" * 100)
    fds = {"none": [], "two": [file.fd, file.fd], "unsealed": [unsealed], "pipe": [reading]}.get(kind, [file.fd])
    status, answer, _ = client.ask_with(fds, path, variable("x"), [200 if kind == "short" else 100])
    expected = (424, "file_missing") if kind == "none" else (400, "bad_request")
    assert (status, answer["error"]["code"]) == expected
    status, progress, _ = client.ask(path, execution(7, "1 + 1"))
    assert (status, progress["result"]["value"]) == (200, 2)
    for fd in (file.fd, unsealed, reading, writing):
        os.close(fd)
    client.sock.close()


# What is said aside


class Aside:
    """A connection that hears asides, and what it was asked; its other end is ``sock``."""

    def __init__(self) -> None:
        self.sock, self.theirs = socket.socketpair()
        self.sock.settimeout(20)
        self.executions: list[Request] = []
        self.answers: list[str] = []
        self._received = 0
        routes = {("POST", "sessions", "executions"): self._execute, ("POST", "tool-calls", "result"): self._answer}
        self.connection = FramedConnection(self.theirs, None, routes, Log(io.StringIO()))  # type: ignore[arg-type]
        self.connection.hear_asides()
        self.greenlet = gevent.spawn(self.connection.serve)

    def _execute(self, request: Request) -> Cancel | None:
        self.executions.append(request)
        return lambda: None

    def _answer(self, request: Request) -> Cancel | None:
        self.answers.append(request.argument)
        return None

    def execute(self) -> None:
        self.sock.sendall(b"".join(dump_frame({"request": "POST /v1/sessions/s/executions", "body": {}})))

    def aside(self, call_id: str) -> bytes:
        return b"".join(dump_frame({"request": f"POST /v1/tool-calls/{call_id}/result", "body": {}, "aside": True}))

    def read(self) -> int:
        """Read what there is; return how much that was, from the start."""
        with contextlib.suppress(BlockingIOError):
            self._received += len(self.sock.recv(1 << 20))
        return self._received

    def until(self, ready: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + 20
        while not ready():
            assert time.monotonic() < give_up_at
            gevent.sleep(0.001)

    def close(self) -> None:
        self.connection.attend(True)
        self.sock.close()
        self.theirs.close()
        self.greenlet.join(20)


@pytest.fixture
def aside() -> Iterator[Aside]:
    made = Aside()
    yield made
    made.close()


def test_asides_are_heard_while_a_request_is_answered_however_many_come_at_once(aside: Aside) -> None:
    aside.execute()
    aside.sock.sendall(b"".join(aside.aside(f"c{number}") for number in range(200)))
    aside.until(lambda: len(aside.answers) == 200)
    assert aside.answers == [f"c{number}" for number in range(200)]
    assert len(aside.executions) == 1


def test_all_that_has_arrived_is_heard_by_whoever_needs_it_now(aside: Aside) -> None:
    aside.execute()
    aside.until(lambda: len(aside.executions) == 1)
    aside.connection.attend(False)
    aside.sock.sendall(b"".join(aside.aside(f"c{number}") for number in range(200)))
    assert aside.connection.read_now()
    assert len(aside.answers) == 200
    assert not aside.connection.read_now()


def test_half_a_frame_is_no_news(aside: Aside) -> None:
    aside.connection.attend(False)
    aside.sock.sendall(aside.aside("c")[:10])
    assert aside.connection.read_now()
    assert not aside.connection.read_now()


def test_an_aside_that_came_while_a_reply_was_leaving_is_heard_afterwards(aside: Aside) -> None:
    aside.execute()
    aside.until(lambda: len(aside.executions) == 1)
    aside.executions[0].answer((Progress(execution_id="e", running=True, more=True), [b"x" * (8 << 20)]))
    aside.sock.sendall(aside.aside("c"))
    aside.until(lambda: not aside.connection._watcher.active)  # it has seen that something is there
    aside.sock.setblocking(False)
    aside.until(lambda: aside.read() > 8 << 20)
    aside.until(lambda: aside.answers == ["c"])


def test_the_next_request_waits_for_its_turn_and_is_served_though_who_sent_it_is_gone(aside: Aside) -> None:
    aside.execute()
    aside.execute()
    aside.until(lambda: aside.connection._next is not None)
    aside.sock.close()
    for _ in range(10):
        gevent.sleep(0.001)
    assert len(aside.executions) == 1
    aside.executions[0].answer(None)  # the worker has told the host
    aside.until(lambda: len(aside.executions) == 2)
    aside.executions[1].answer(None)


def test_what_may_not_be_said_aside_is_not_done_and_ends_nothing(aside: Aside) -> None:
    for request in ("POST /v1/sessions/s/executions", "GET /", "nonsense", "POST /v1/tool-calls/c/start"):
        aside.sock.sendall(b"".join(dump_frame({"request": request, "body": {}, "aside": True})))
    aside.sock.sendall(aside.aside("c"))
    aside.until(lambda: aside.answers == ["c"])
    assert aside.executions == []
