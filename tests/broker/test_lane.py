"""Claims about the lane: an execution runs once whichever way it comes, and the broker knows of each."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from broker.protocol.frames import FrameAssembler, dump_frame
from broker.testing import InProcessBroker
from tests.broker.test_framed import FramedClient

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
        header |= {"pipe": "kept", "sent_at": time.monotonic() if sent_at is None else sent_at}
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

    def stored(self, execution_id: str) -> dict[str, Any]:
        """Return the broker's reply to an execution, waiting for its end."""
        wanted = {"limit": 0, "wait_s": 20, "execution_id": execution_id}
        status, progress, _ = self.box.host.request("POST", f"/v1/sessions/{self.session}/claims", wanted)
        assert status == 200, progress
        return progress["result"]

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


@pytest.mark.parametrize("code", ["print('hello'); 2", "import os; os.write(1, b'hello\\n'); 2"])
def test_what_is_printed_comes_from_the_broker(client: LaneClient, code: str) -> None:
    client.both(code)
    status, progress, _ = client.receive()
    assert (status, progress["result"]["output"], progress["result"]["value"]) == (200, "hello\n", 2)


def test_a_tool_call_and_the_end_of_its_execution_come_from_the_broker(client: LaneClient) -> None:
    client.both("ask(1) + 1")
    _, progress, _ = client.receive()
    [claim] = progress["claims"]
    client.box.host.request("POST", f"/v1/tool-calls/{claim['call_id']}/result", {"attempt": 1, "value": 41})
    assert client.receive()[1]["result"]["value"] == 42


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
