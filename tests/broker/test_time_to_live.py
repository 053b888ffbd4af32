"""A session that nobody uses for its time to live is ended by the broker, and never one in which something runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from broker.errors import SessionLost
from broker.protocol.messages import ExecutionResult, Outcome, ToolResult
from broker.session import EXPIRED, Session
from broker.testing import FakeClock, FakeExecution, InProcessBroker
from broker.testing.fake_worker import ok
from tests.broker.conftest import Client
from tests.broker.test_session import NotingWorker, call, request, result

TTL_S = 3600.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def worker() -> NotingWorker:
    return NotingWorker()


@pytest.fixture
def session(worker: NotingWorker, clock: FakeClock) -> Session:
    return Session("s", 0, worker, clock=clock, ttl_s=TTL_S)


def due_in(session: Session, clock: FakeClock) -> float | None:
    at = session.next_deadline()
    return None if at is None else at - clock.now


def test_it_ends_when_it_was_idle_for_its_time_and_says_so(
    session: Session, worker: NotingWorker, clock: FakeClock
) -> None:
    clock.advance(TTL_S - 1)
    session.tick()
    assert (session.lost, due_in(session, clock)) == (None, 1)
    clock.advance(1)
    session.tick()
    assert session.lost == EXPIRED == "expired"
    assert worker.killed
    assert session.next_deadline() is None
    for act in (lambda: session.attach(None), lambda: session.execute(request(), [])):
        with pytest.raises(SessionLost) as lost:
            act()
        assert lost.value.reason == EXPIRED


def test_a_session_without_a_time_to_live_never_ends(worker: NotingWorker, clock: FakeClock) -> None:
    session = Session("s", 0, worker, clock=clock)
    clock.advance(1e9)
    session.tick()
    assert (session.lost, session.next_deadline()) == (None, None)


def test_it_counts_from_the_end_of_an_execution_and_not_while_one_runs(session: Session, clock: FakeClock) -> None:
    clock.advance(TTL_S - 1)
    session.execute(request(), [])
    clock.advance(10 * TTL_S)
    session.tick()
    assert (session.lost, session.idle_s(), due_in(session, clock)) == (None, 0, None)
    session.frame_received(result(), [])
    assert due_in(session, clock) == TTL_S
    clock.advance(TTL_S)
    session.tick()
    assert session.lost == EXPIRED


def test_it_does_not_end_under_a_tool_call_whose_host_is_silent(session: Session, clock: FakeClock) -> None:
    session.execute(request(), [])
    pending = session.submit(call(), [], 0)
    session.tool_calls.claim(limit=1, lease_s=2 * TTL_S, start=True)
    clock.advance(TTL_S + 1)
    session.tick()
    assert session.lost is None
    session.tool_calls.finish(pending.call_id, ToolResult(attempt=1, value="late"))
    session.frame_received(result(), [])
    assert session.find("e1") is not None
    assert session.lost is None


@pytest.mark.parametrize("act", ["attach", "detach"])
def test_whoever_comes_or_goes_has_the_whole_time_from_then_on(session: Session, clock: FakeClock, act: str) -> None:
    clock.advance(TTL_S - 1)
    if act == "attach":
        session.attach(None)
    else:
        session.detach()
    assert (session.idle_s(), due_in(session, clock)) == (0, TTL_S)


def test_the_end_of_an_execution_sets_the_alarm(worker: NotingWorker, clock: FakeClock) -> None:
    rung: list[float] = []
    session = Session("s", 0, worker, clock=clock, ttl_s=TTL_S, on_deadline=lambda: rung.append(clock.now))
    session.execute(request(), [])
    rung.clear()
    clock.advance(5)
    session.frame_received(result(), [])
    assert rung == [clock.now]


# Over HTTP, with the broker's own timer.


@pytest.fixture
def entered() -> threading.Event:
    return threading.Event()


@pytest.fixture
def box(entered: threading.Event) -> Iterator[InProcessBroker]:
    def work(execution: FakeExecution) -> ExecutionResult:
        if execution.header["code"] == "call":
            entered.set()
            return ok(execution.call_tool("search").to_json())
        return ok()

    with InProcessBroker(work) as broker:
        yield broker


def opened(box: InProcessBroker, **wanted: object) -> Client:
    status, session, _ = box.host.request("POST", "/v1/sessions", wanted)
    assert status == 201, session
    return Client(box, session["session_id"])


def test_who_waits_is_told_when_it_ends_its_slot_is_free_and_so_is_its_name(box: InProcessBroker) -> None:
    client = opened(box, name="short", ttl_s=0.1)
    status, reply, _ = client.claims(wait_s=20)  # a long poll: answered by the end of the session
    assert (status, reply["error"]["reason"]) == (410, "expired")
    [session] = box.host.request("GET", "/v1/sessions")[1]["sessions"]
    assert (session["state"], session["lost"], session["ttl_s"]) == ("lost", "expired", 0.1)
    again = opened(box, name="short")
    assert box.host.request("GET", f"/v1/sessions/{again.session_id}")[1]["state"] == "idle"


def test_a_tool_call_that_takes_longer_than_the_time_to_live_is_answered(
    box: InProcessBroker, entered: threading.Event
) -> None:
    client = opened(box, ttl_s=0.1)
    [claim] = client.run("call").claims
    assert client.claims(wait_s=0.3, limit=0)[0] == 200  # longer than its time to live
    assert client.answer(claim.call_id, "late") == 200
    status, reply, _ = client.claims(wait_s=20, execution_id=claim.execution_id)
    assert (status, reply["result"]["outcome"]) == (200, Outcome.OK.value)


@pytest.mark.parametrize("ttl_s", [0, -1, 0.05, 1e12, "1", True])
def test_a_time_to_live_that_makes_no_sense_is_refused(box: InProcessBroker, ttl_s: object) -> None:
    status, reply, _ = box.host.request("POST", "/v1/sessions", {"ttl_s": ttl_s})
    assert (status, "ttl_s" in reply["error"]["message"]) == (400, True)


# Who holds it.


HOLDER = {"pid": 7, "program": "analysis.py", "identity": ""}


def test_whoever_attaches_to_a_session_that_has_run_no_code_finds_nothing_to_resume(box: InProcessBroker) -> None:
    client = opened(box, name="rehearsed", keep=True)
    client.run("")
    attached = box.host.request("POST", f"/v1/sessions/{client.session_id}/attach", {})[1]
    assert (attached["epoch"], attached["execution_id"], attached["running"]) == (2, None, False)


def test_a_session_says_who_holds_it_and_what_it_did(box: InProcessBroker) -> None:
    client = opened(box, name="novel", keep=True, held_by=HOLDER)
    client.run("")  # which runs nothing, and does not count
    client.run("1")

    def shown() -> dict[str, object]:
        session = box.host.request("GET", f"/v1/sessions/{client.session_id}")[1]
        return {key: session[key] for key in ("held_by", "keep", "executions", "ttl_s")}

    assert shown() == {"held_by": HOLDER, "keep": True, "executions": 1, "ttl_s": None}
    path = f"/v1/sessions/{client.session_id}"
    box.host.request("POST", f"{path}/attach", {"held_by": {**HOLDER, "pid": 8}})
    assert shown()["held_by"] == {**HOLDER, "pid": 8}
    assert box.host.request("POST", f"{path}/detach")[0] == 409, "the first one holds it no more"
    detached = box.host.request("POST", f"{path}/detach?epoch=2")[1]
    assert (detached["held_by"], detached["epoch"]) == (None, 3)
    assert box.host.request("POST", f"{path}/detach?epoch=2")[0] == 409, "it has let go"


def test_a_name_that_is_taken_says_by_whom(box: InProcessBroker) -> None:
    opened(box, name="novel", held_by=HOLDER)
    status, reply, _ = box.host.request("POST", "/v1/sessions", {"name": "novel"})
    assert (status, reply["error"]["code"]) == (409, "session_name_taken")
    assert "held by analysis.py (process 7)" in reply["error"]["message"]


def test_a_session_that_must_be_idle_to_be_closed_is_left_alone_while_something_runs(box: InProcessBroker) -> None:
    client = opened(box)
    [claim] = client.run("call").claims
    status, reply, _ = box.host.request("DELETE", f"/v1/sessions/{client.session_id}?idle=1")
    assert (status, reply["error"]["code"]) == (409, "session_busy")
    assert client.answer(claim.call_id) == 200
    client.claims(wait_s=20, execution_id=claim.execution_id)
    assert box.host.request("DELETE", f"/v1/sessions/{client.session_id}?idle=1")[0] == 200
