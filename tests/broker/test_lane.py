"""Claims about the lane: an execution runs once whichever way it comes, and the broker knows of each."""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.frames import FrameAssembler, dump_frame
from broker.session import MAX_STRAY_FRAMES, Session
from broker.testing import InProcessBroker
from tests.broker.test_framed import FramedClient

#: Everything in its process is generated code's own.
FIND_WORKER = "import gc\nworker = next(o for o in gc.get_objects() if type(o).__name__ == 'Worker')\n"
TOOLS = [{"name": "ask", "parameters": None}]


class LaneClient(FramedClient):
    """A connection with a lane, in a session of its own."""

    def __init__(self, box: InProcessBroker) -> None:
        super().__init__(box.host_socket)
        self.box = box
        self.session = str(box.host.request("POST", "/v1/sessions", {})[1]["session_id"])
        self.ids = itertools.count(1)
        self.run("0")  # its pipe is kept from here on
        self.lane = self.open_lane()
        self.lane_frames = FrameAssembler()

    def open_lane(self, epoch: int = 1) -> socket.socket:
        self.send(f"POST /v1/sessions/{self.session}/lane?epoch={epoch}", {})
        data, fds, _, _ = socket.recv_fds(self.sock, 4096, 1)
        assert data
        lane = socket.socket(fileno=fds[0])
        lane.settimeout(20)
        return lane

    def run(self, code: str) -> dict[str, Any]:
        """Run code in the ordinary way."""
        path = f"/v1/sessions/{self.session}/executions?wait_s=20"
        body = {"execution_id": f"o{next(self.ids)}", "code": code, "tools": TOOLS}
        status, progress, _ = self.box.host.request("POST", path, body)
        assert status == 200, progress
        return progress["result"]

    def announce(self, code: str, **fields: Any) -> str:
        """Tell the broker; return the execution's id."""
        execution_id = f"{self.session}-{next(self.ids)}"
        path = f"POST /v1/sessions/{self.session}/executions?wait_s=20&stream=1&lane=1"
        self.send(path, {"execution_id": execution_id, "code": code, **fields})
        return execution_id

    def tell(self, execution_id: str, code: str, sent_at: float | None = None) -> None:
        """Tell the worker."""
        header = {"type": "execute", "execution_id": execution_id, "code": code, "variables": {}, "drop": []}
        header |= {"pipe": "kept", "calls": True, "output_bytes": 16 << 10}
        header |= {"sent_at": time.monotonic() if sent_at is None else sent_at}
        self.lane.sendall(b"".join(dump_frame(header)))

    def both(self, code: str) -> str:
        execution_id = self.announce(code)
        self.tell(execution_id, code)
        return execution_id

    def heard(self) -> dict[str, Any]:
        """Return the next frame of the lane."""
        while (frame := self.lane_frames.next()) is None:
            data = self.lane.recv(65536)
            assert data, "the lane was closed"
            self.lane_frames.add(data)
        return frame[0]

    def called(self) -> dict[str, Any]:
        """Return the tool call that comes on the lane next."""
        while (frame := self.heard())["type"] != "call":
            pass  # the end of the one before, which the broker has told too
        return {**frame, "call_id": f"{frame['execution_id']}-{frame['key']}"}

    def aside(self, call: dict[str, Any], value: Any, epoch: int = 1) -> None:
        """Tell the broker of an answer, and nobody else."""
        request = f"POST /v1/tool-calls/{call['call_id']}/result?epoch={epoch}"
        frame = {"request": request, "body": {"attempt": 1, "value": value}, "aside": True}
        self.sock.sendall(b"".join(dump_frame(frame)))

    def answer(self, call: dict[str, Any], value: Any) -> None:
        """Answer a call as the host does: the broker first."""
        self.aside(call, value)
        self.on_lane(call, state="done", attempt=1, value=value)

    def on_lane(self, call: dict[str, Any], **fields: Any) -> None:
        """Tell the worker of a call."""
        self.lane.sendall(b"".join(dump_frame({"type": "answer", "key": call["key"], **fields})))

    def call_state(self, call: dict[str, Any]) -> Any:
        status, body, _ = self.box.host.request("GET", f"/v1/tool-calls/{call['call_id']}")
        return body["state"] if status == 200 else body["error"]["code"]

    def stored(self, execution_id: str) -> dict[str, Any]:
        """Return the broker's reply to an execution, waiting for its end."""
        wanted = {"limit": 0, "wait_s": 20, "execution_id": execution_id}
        status, progress, _ = self.box.host.request("POST", f"/v1/sessions/{self.session}/claims", wanted)
        assert status == 200, progress
        return progress["result"]

    def ended(self, execution_id: str) -> dict[str, Any]:
        """Wait until worker or broker have told the end of an execution; return what the broker has stored."""
        assert select.select([self.sock, self.lane], [], [], 20)[0]
        self.box.host.request("POST", f"/v1/executions/{execution_id}/interrupt", {})  # the broker reads what there is
        return self.stored(execution_id)

    def close(self) -> None:
        self.sock.close()
        self.lane.close()


@pytest.fixture(scope="module")
def box() -> Iterator[InProcessBroker]:
    with InProcessBroker() as running:
        yield running


@pytest.fixture
def client(box: InProcessBroker) -> Iterator[LaneClient]:
    made = LaneClient(box)
    yield made
    made.close()
    box.host.request("DELETE", f"/v1/sessions/{made.session}")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's word counts however slow the machine is; see ``roomy``."""
    monkeypatch.setattr("broker.protocol.limits.LANE_PATIENCE_S", 60.0)


def test_the_worker_answers_and_the_broker_knows_the_same(client: LaneClient, patient: None) -> None:
    told = 0
    for number in range(50):
        execution_id = client.both(f"x = {number}\nx + 1")
        stored = client.stored(execution_id)
        assert (stored["outcome"], stored["value"]) == ("ok", number + 1)
        client.sock.setblocking(False)
        try:
            late = client.receive()  # where the machine was too slow for the lane, the broker has answered
            assert late[1]["result"]["value"] == number + 1
        except BlockingIOError:
            heard = client.heard()
            assert (heard["execution_id"], heard["value"]) == (execution_id, number + 1)
            told += 1
        client.sock.settimeout(20)
    assert told > 0


@pytest.fixture
def unread(box: InProcessBroker, monkeypatch: pytest.MonkeyPatch, patient: None) -> Iterator[LaneClient]:
    """One whose broker reads nothing by itself while the lane is in use."""
    monkeypatch.setattr("broker.lull.LULL_S", 60.0)
    made = LaneClient(box)
    # As the host's: a time limit of Python's own takes a socket for full that is so by a quarter.
    made.sock.settimeout(None)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        made.sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", 20, 0))
    yield made
    made.close()
    box.host.request("DELETE", f"/v1/sessions/{made.session}")


def told_and_stored(client: LaneClient, code: str) -> tuple[str, str]:
    """Return what was printed, as the worker says on the lane, and as the broker has it."""
    for _ in range(100):
        execution_id = client.both(code)
        stored = client.stored(execution_id)
        if select.select([client.lane], [], [], 0)[0]:
            heard = client.heard()
            assert heard["execution_id"] == execution_id
            return heard.get("printed", ""), stored["output"]
        client.receive()  # the machine was too slow for the lane
    raise AssertionError("the lane was never used")


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print('hello')", "hello\n"),
        ("import os; os.write(1, b'hello\\n')", "hello\n"),
        ("import sys; print('o'); print('e', file=sys.stderr); os.write(2, b'raw')", "o\ne\nraw"),
        ("print('x' * 10_000); 1/0", "x" * 10_000 + "\n"),
        ("os.write(1, 'é'.encode() + b'\\xff')", "é\ufffd"),
        ("pass", ""),
    ],
)
def test_a_little_output_comes_with_the_result_and_the_broker_has_the_same(
    client: LaneClient, patient: None, code: str, printed: str
) -> None:
    client.run("import os")
    for _ in range(3):
        assert told_and_stored(client, code) == (printed, printed)


def test_each_output_is_its_own_executions_where_the_broker_reads_of_many_at_once(
    unread: LaneClient, patient: None
) -> None:
    told = {}
    for number in range(30):
        execution_id = unread.both(f"print({number})")
        ready, _, _ = select.select([unread.lane, unread.sock], [], [], 20)
        if unread.lane in ready:
            assert unread.heard()["printed"] == f"{number}\n"
            told[execution_id] = number
        else:
            unread.receive()
    assert told
    for each in told:
        unread.box.host.request("POST", f"/v1/executions/{each}/interrupt", {})  # the broker reads what there is
    assert {each: unread.stored(each)["output"] for each in told} == {each: f"{told[each]}\n" for each in told}


@pytest.mark.parametrize(
    "code", ["print('x' * 20_000)", "print('x' * 300_000)", "for _ in range(300): print('x' * 999)"]
)
def test_much_output_comes_from_the_broker_which_reads_at_once_what_would_fill_the_pipe(
    unread: LaneClient, patient: None, code: str
) -> None:
    for _ in range(3):
        unread.both(code)
        assert len(unread.receive()[1]["result"]["output"]) >= 20_001
        unread.run("print('after')")


def test_the_workers_late_word_of_its_output_reaches_the_broker_alone(client: LaneClient) -> None:
    execution_id = client.announce("print('late')")
    client.tell(execution_id, "print('late')", sent_at=time.monotonic() - 1)
    assert client.receive()[1]["result"]["output"] == "late\n"
    assert not select.select([client.lane], [], [], 0)[0]


def test_where_it_is_late_after_the_output_was_taken_back_the_broker_has_all_of_it(
    client: LaneClient, patient: None
) -> None:
    client.run(
        FIND_WORKER + "soon = iter([True, False])\n"
        "type(worker)._is_soon = staticmethod(lambda header: next(soon, False))"
    )
    client.both("print('taken back')")
    assert client.receive()[1]["result"]["output"] == "taken back\n"


def test_code_that_closes_the_pipes_other_end_has_its_output_all_the_same(client: LaneClient) -> None:
    find = "import gc, os\ncapture = next(o for o in gc.get_objects() if type(o).__name__ == 'Capture')\n"
    client.run(find + "os.close(capture._reader); other = open('/dev/zero', 'rb')")
    assert client.run("other.fileno() == capture._reader")["value"] is True
    for word in ("heard", "again"):
        client.both(f"print({word!r})")
        assert client.receive()[1]["result"]["output"] == f"{word}\n"
    client.run("import subprocess; subprocess.run(['true'])")
    assert client.run("other.read(1)")["outcome"] == "ok"  # a new pipe came, and this file is nobody else's


def test_who_forges_more_output_than_a_worker_tells_loses_the_session(client: LaneClient, patient: None) -> None:
    client.run(FIND_WORKER + "type(worker)._take_printed = lambda worker, header: 'x' * 20_000")
    client.both("1")
    assert client.receive()[1]["result"]["session_lost"] == "protocol"


def test_code_may_print_much_again_and_again_but_not_say_so_without_end(client: LaneClient) -> None:
    for _ in range(MAX_STRAY_FRAMES + 20):
        client.both("print('x' * 40_000)")
        assert client.receive()[1]["result"]["outcome"] == "ok"
    client.both(FIND_WORKER + f"for _ in range({MAX_STRAY_FRAMES + 20}): worker._prints_much()")
    assert client.receive()[1]["result"]["session_lost"] == "protocol"


def test_what_nobody_reads_is_read_before_a_socket_is_full(unread: LaneClient, patient: None) -> None:
    for number in range(500):
        unread.both(f"{number}  # {'x' * 2_000}")
        ready, _, _ = select.select([unread.lane, unread.sock], [], [], 20)
        if unread.lane in ready:
            assert unread.heard()["value"] == number
        else:
            assert unread.receive()[1]["result"]["value"] == number


def test_a_tool_call_goes_by_the_lane_and_the_broker_knows_of_it_and_of_its_answer(
    client: LaneClient, patient: None
) -> None:
    execution_id = client.both("ask(1) + 1")
    call = client.called()
    assert (call["tool"], call["args"], call["kwargs"], call["execution_id"]) == ("ask", [1], {}, execution_id)
    client.answer(call, 41)
    assert client.stored(execution_id)["value"] == 42
    assert client.call_state(call) == "done"


def test_a_call_that_the_host_refuses_the_broker_offers_as_the_same_attempt(client: LaneClient) -> None:
    execution_id = client.both("ask(1) + 1")
    call = client.called()
    client.on_lane(call, told="refused")
    [claim] = client.receive()[1]["claims"]
    assert (claim["call_id"], claim["attempt"]) == (call["call_id"], 1)
    client.box.host.request("POST", f"/v1/tool-calls/{claim['call_id']}/result", {"attempt": 1, "value": 41})
    assert client.stored(execution_id)["value"] == 42


def test_a_call_whose_lane_ends_is_offered_by_the_broker(client: LaneClient) -> None:
    client.both("ask(1) + 1")
    call = client.called()
    client.lane.shutdown(socket.SHUT_RDWR)
    [claim] = client.receive()[1]["claims"]
    assert (claim["call_id"], claim["attempt"]) == (call["call_id"], 1)
    client.aside(call, 41)
    assert client.receive()[1]["result"]["value"] == 42


def test_an_answer_that_the_lane_does_not_bring_comes_from_the_broker(client: LaneClient) -> None:
    execution_id = client.both("ask(1) + 1")
    call = client.called()
    client.on_lane(call)
    client.aside(call, 41)
    assert client.stored(execution_id)["value"] == 42
    assert client.call_state(call) == "done"


def test_answers_of_other_calls_are_not_taken_for_this_one(client: LaneClient) -> None:
    execution_id = client.both("[ask(1), ask(2)]")
    first = client.called()
    client.on_lane({"key": "fff"}, state="done", attempt=1, value="another's")
    client.answer(first, "one")
    second = client.called()
    client.answer(first, "one again")
    client.answer(second, "two")
    assert client.stored(execution_id)["value"] == ["one", "two"]


def test_a_deadline_ends_a_call_on_the_lane(client: LaneClient) -> None:
    execution_id = client.announce("ask(1)", timeout_s=0.3)
    client.tell(execution_id, "ask(1)")
    call = client.called()
    assert client.stored(execution_id)["outcome"] == "timed_out"
    assert client.call_state(call) == "expired"
    assert client.run("1")["value"] == 1


def test_an_interrupt_ends_a_call_on_the_lane_and_keeps_the_session(client: LaneClient) -> None:
    client.run("kept = 1")
    for _ in range(10):
        execution_id = client.both("ask(1)")
        call = client.called()
        client.box.host.request("POST", f"/v1/executions/{execution_id}/interrupt", {})
        assert client.stored(execution_id)["outcome"] == "interrupted"
        assert client.call_state(call) == "cancelled"
        client.answer(call, "late")
    assert client.run("kept")["value"] == 1


def test_an_answer_counts_also_where_the_broker_has_not_read_of_its_call(unread: LaneClient) -> None:
    execution_id = unread.both("ask(1) + 1")
    call = unread.called()
    unread.on_lane(call)
    path = f"/v1/tool-calls/{call['call_id']}/result"
    status, body, _ = unread.box.host.request("POST", path, {"attempt": 1, "value": 41})
    assert (status, body["state"]) == (200, "done")
    assert unread.stored(execution_id)["value"] == 42


def test_answers_that_nobody_has_read_count_however_many(unread: LaneClient) -> None:
    execution_id = unread.both("[ask(n) for n in range(50)][-1]")
    calls = []
    for number in range(50):  # more than are taken at a time
        calls.append(unread.called())
        unread.answer(calls[-1], number)
    assert unread.ended(execution_id)["value"] == 49
    assert {unread.call_state(call) for call in calls} == {"done"}


def test_what_the_worker_tells_the_broker_alone_it_rings_for(unread: LaneClient) -> None:
    for number in range(3):
        unread.both(f"print('x' * 20_000); print({number})")
        assert unread.receive()[1]["result"]["output"].endswith(f"\n{number}\n")


def test_what_comes_in_the_ordinary_way_is_read_as_it_comes(unread: LaneClient) -> None:
    unread.both("1")
    assert unread.heard()["value"] == 1
    assert unread.run("2")["value"] == 2


def test_of_a_call_that_got_to_the_old_client_the_new_one_is_told(
    client: LaneClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, heard = tmp_path / "now", []
    attach = Session.attach

    def called_in_between(session: Session, *args: Any) -> Any:
        now.touch()  # the worker calls at this very moment
        heard.append(client.lane.recv(65536))
        return attach(session, *args)

    monkeypatch.setattr(Session, "attach", called_in_between)
    client.run(f"import os\ndef call():\n    while not os.path.exists({str(now)!r}): pass\n    return ask(1)")
    execution_id = client.both("call()")
    attached = client.box.host.request("POST", f"/v1/sessions/{client.session}/attach", {"epoch": 1})[1]
    assert (heard, attached["started"]) == ([b""], [])
    path = f"/v1/sessions/{client.session}/claims?epoch=2"
    claims = client.box.host.request("POST", path, {"wait_s": 20, "execution_id": execution_id})[1]["claims"]
    assert [(claim["tool"], claim["attempt"]) for claim in claims] == [("ask", 1)]
    result = f"/v1/tool-calls/{claims[0]['call_id']}/result?epoch=2"
    client.box.host.request("POST", result, {"attempt": 1, "value": "new"})
    ended = client.box.host.request("POST", path, {"limit": 0, "wait_s": 20, "execution_id": execution_id})[1]
    assert ended["result"]["value"] == "new"


def test_the_new_client_is_told_of_a_call_that_only_the_old_one_has_heard_of(unread: LaneClient) -> None:
    unread.both("ask(1)")
    call = unread.called()
    attached = unread.box.host.request("POST", f"/v1/sessions/{unread.session}/attach", {"epoch": 1})[1]
    assert [started["call_id"] for started in attached["started"]] == [call["call_id"]]


def test_call_and_answer_that_are_read_together_with_their_execution_count(unread: LaneClient) -> None:
    unread.both("0")  # from here on the broker reads nothing
    if select.select([unread.sock, unread.lane], [], [], 20)[0] == [unread.lane]:
        unread.heard()
    execution_id = unread.both("ask(1) + 1")
    call = unread.called()
    unread.answer(call, 41)
    assert unread.ended(execution_id)["value"] == 42
    assert unread.call_state(call) == "done"


@pytest.mark.parametrize("before", [True, False])
def test_an_answer_that_was_given_before_an_attach_counts_and_one_after_it_does_not(
    unread: LaneClient, before: bool
) -> None:
    execution_id = unread.both("ask(1)")
    call = unread.called()
    if before:
        unread.aside(call, "old")
    attached = unread.box.host.request("POST", f"/v1/sessions/{unread.session}/attach", {"epoch": 1})[1]
    assert [each["call_id"] for each in attached["started"]] == ([] if before else [call["call_id"]])
    if not before:
        unread.aside(call, "too late")
        done = f"/v1/tool-calls/{call['call_id']}/result?epoch=2"
        assert unread.box.host.request("POST", done, {"attempt": 1, "value": "new"})[0] == 200
    wanted = {"limit": 0, "wait_s": 20, "execution_id": execution_id}
    ended = unread.box.host.request("POST", f"/v1/sessions/{unread.session}/claims?epoch=2", wanted)[1]
    assert ended["result"]["value"] == ("old" if before else "new")


def test_who_is_refused_ends_no_lane(client: LaneClient) -> None:
    status = client.box.host.request("POST", f"/v1/sessions/{client.session}/attach", {"epoch": 7})[0]
    assert status == 409
    client.lane.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.lane.recv(1)


FORGE_CALL = (
    "import gc, json, struct\n"
    "inbox = next(o for o in gc.get_objects() if type(o).__name__ == 'Inbox')\n"
    "current = next(o for o in gc.get_objects() if type(o).__name__ == 'Current')\n"
    "def forge(key='1', **more):\n"
    "    header = {'type': 'call', 'key': key, 'execution_id': current.execution.execution_id, 'tool': 'ask'}\n"
    "    head = json.dumps({**header, 'args': [], 'kwargs': {}, **more}).encode()\n"
    "    return struct.pack('>I', len(head)) + head\n"
)


def test_a_call_of_an_execution_that_came_in_the_ordinary_way_does_not_count_as_begun(client: LaneClient) -> None:
    client.run(FORGE_CALL)
    client.run("inbox._channel._sock.sendall(forge('abc'))")
    assert client.call_state({"call_id": "o3-abc"}) == "unknown_call"


@pytest.mark.parametrize("more", ["key='zz'", "tool='other'", "execution_id='other'", "args=['x' * 33_000]", "args=5"])
def test_calls_that_make_no_sense_do_not_count_and_a_hundred_end_the_session(client: LaneClient, more: str) -> None:
    client.run(FORGE_CALL)
    lives = client.both(f"for n in range(90): inbox._channel._sock.sendall(forge({more}))\n'lives'")
    assert client.stored(lives)["value"] == "lives"
    client.both(f"for n in range(20): inbox._channel._sock.sendall(forge({more}))\nwhile True: pass")
    give_up_at = time.monotonic() + 20
    while (lost := client.box.host.request("GET", f"/v1/sessions/{client.session}")[1]["lost"]) is None:
        assert time.monotonic() < give_up_at
    assert lost == "protocol"


def test_what_never_comes_on_the_lane_the_broker_brings(client: LaneClient) -> None:
    client.announce("n = 7\nn")
    assert client.receive()[1]["result"]["value"] == 7


def test_what_comes_on_both_ways_runs_once(client: LaneClient) -> None:
    client.run("runs = 0")
    code = "import time\nruns += 1\ntime.sleep(0.2)\nruns"
    client.both(code)
    assert client.receive()[1]["result"]["value"] == 1
    assert client.run("runs")["value"] == 1


def test_what_comes_on_the_lane_after_the_broker_has_brought_it_does_not_run_again(client: LaneClient) -> None:
    client.run("runs = 0")
    execution_id = client.announce("runs += 1\nruns")
    assert client.receive()[1]["result"]["value"] == 1
    client.tell(execution_id, "runs += 1\nruns")
    assert client.run("runs")["value"] == 1


def test_the_workers_word_is_not_asked_for_long_after_it_was_sent(client: LaneClient, patient: None) -> None:
    execution_id = client.announce("5")
    client.tell(execution_id, "5", sent_at=time.monotonic() - 1.0)
    assert client.receive()[1]["result"]["value"] == 5


def test_a_new_holder_ends_the_lane_and_what_was_not_announced_never_runs(client: LaneClient) -> None:
    running = client.both("import time; time.sleep(0.4); 'first'")
    client.tell("never-announced", "stolen = True")
    status, attached, _ = client.box.host.request("POST", f"/v1/sessions/{client.session}/attach", {"epoch": 1})
    assert (status, attached["execution_id"], attached["running"]) == (200, running, True)
    path = f"/v1/sessions/{client.session}/claims?epoch=2"
    ended = client.box.host.request("POST", path, {"limit": 0, "wait_s": 20, "execution_id": running})[1]
    assert ended["result"]["value"] == "first"
    path = f"/v1/sessions/{client.session}/executions?epoch=2&wait_s=20"
    found = client.box.host.request("POST", path, {"execution_id": "look", "code": "'stolen' in globals()"})[1]
    assert found["result"]["value"] is False
    with pytest.raises(BrokenPipeError):
        client.tell("too-late", "1")


def test_what_was_announced_before_an_attach_counts(client: LaneClient) -> None:
    execution_id = client.announce("kept = 1\nkept")
    client.tell(execution_id, "kept = 1\nkept")
    attached = client.box.host.request("POST", f"/v1/sessions/{client.session}/attach", {"epoch": 1})[1]
    assert attached["execution_id"] == execution_id


def test_another_epoch_gets_no_lane(client: LaneClient) -> None:
    client.send(f"POST /v1/sessions/{client.session}/lane?epoch=5", {})
    status, body, _ = client.receive()
    assert (status, body["error"]["code"]) == (409, "fenced")


def test_a_second_lane_ends_the_first(client: LaneClient) -> None:
    first, client.lane = client.lane, client.open_lane()
    client.lane_frames = FrameAssembler()
    assert first.recv(1) == b""
    first.close()
    assert client.stored(client.both("2 + 2"))["value"] == 4


def test_a_deadline_holds_for_what_came_on_the_lane(client: LaneClient) -> None:
    execution_id = client.announce("while True: pass", timeout_s=0.3)
    client.tell(execution_id, "while True: pass")
    assert client.receive()[1]["result"]["outcome"] == "timed_out"
    assert client.run("1")["value"] == 1


def test_an_interrupt_before_the_lane_brings_it_stops_it_all_the_same(client: LaneClient, patient: None) -> None:
    execution_id = client.announce("while True: pass")
    client.box.host.request("POST", f"/v1/executions/{execution_id}/interrupt", {})
    assert client.receive()[1]["result"]["outcome"] == "interrupted"
    assert client.run("1")["value"] == 1


def test_the_end_of_the_worker_ends_lane_and_execution(client: LaneClient) -> None:
    client.both("import os; os._exit(3)")
    result = client.receive()[1]["result"]
    assert (result["outcome"], result["session_lost"]) == ("worker_died", "exited(3)")
    assert client.lane.recv(1) == b""


def test_a_forked_child_holds_no_end_of_the_lane(client: LaneClient) -> None:
    pid = client.run("import os, time\npid = os.fork()\nif not pid: time.sleep(30)\npid")["value"]
    client.run("1")
    client.both("import os; os.kill(pid, 9); os._exit(0)")
    client.receive()
    assert client.lane.recv(1) == b""
    assert pid > 0


def test_a_session_that_is_lost_has_no_lane(client: LaneClient) -> None:
    client.run("import os; os._exit(0)")
    client.send(f"POST /v1/sessions/{client.session}/lane?epoch=1", {})
    status, body, _ = client.receive()
    assert (status, body["error"]["code"]) == (410, "session_lost")


def test_descriptors_of_lanes_do_not_add_up(box: InProcessBroker) -> None:
    def rounds(count: int) -> int:
        for _ in range(count):
            made = LaneClient(box)
            made.open_lane().close()
            box.host.request("DELETE", f"/v1/sessions/{made.session}")
            made.close()
        return len(os.listdir("/proc/self/fd"))

    before = rounds(3)
    give_up_at = time.monotonic() + 20
    while rounds(10) > before + 3:  # the last ones are closed in the background
        assert time.monotonic() < give_up_at
