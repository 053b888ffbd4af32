"""The session's core with a worker that only takes notes, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from broker.errors import CallGone, ExecutionEnded, SessionBusy, SessionLost, UnknownExecution, UnknownTool
from broker.output import Output
from broker.protocol import limits
from broker.protocol.messages import (
    CallState,
    ExecuteRequest,
    Outcome,
    ToolCallRequest,
    ToolDefinition,
    ToolResult,
)
from broker.session import EXIT_REASON_WAIT_S, Session
from broker.testing import FakeClock

SEARCH = ToolDefinition(name="search", parameters=None)


class NotingWorker:
    """Implements ``session.Worker``."""

    def __init__(self) -> None:
        self.headers: list[dict[str, Any]] = []
        self.interrupts = 0
        self.killed = False
        self.printed = Output()

    def execute(self, header: dict[str, Any], blobs: Sequence[Any], *, max_output_bytes: int) -> None:
        self.headers.append(header)

    def interrupt(self) -> None:
        self.interrupts += 1

    def take_output(self, rest: str, *, keep: bool) -> Output:
        assert not self.killed, "output is taken before the pipes are closed"
        return self.printed

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def worker() -> NotingWorker:
    return NotingWorker()


@pytest.fixture
def session(worker: NotingWorker, clock: FakeClock) -> Session:
    return Session("s", 0, worker, clock=clock)


def request(execution_id: str = "e1", **fields: Any) -> ExecuteRequest:
    return ExecuteRequest(**{"execution_id": execution_id, "code": "1", "tools": (SEARCH,), **fields})


def result(execution_id: str = "e1", outcome: str = "ok", **fields: Any) -> dict[str, Any]:
    return {"type": "result", "execution_id": execution_id, "outcome": outcome, "value": None, **fields}


def call(execution_id: str = "e1", key: str = "k", tool: str = "search") -> ToolCallRequest:
    return ToolCallRequest(key=key, execution_id=execution_id, tool=tool)


def test_an_execution_runs_and_its_reply_is_stored(session: Session, worker: NotingWorker, clock: FakeClock) -> None:
    worker.printed = Output("hello\n", 3)
    execution = session.execute(request(), [])
    clock.advance(1.5)
    session.frame_received(result(value={"$blob": [0, "str"]}, display="shown"), [b"text"])
    assert execution.result is not None
    assert execution.result.outcome is Outcome.OK
    assert (execution.result.output, execution.result.discarded_output_bytes) == ("hello\n", 3)
    assert (execution.result.value, execution.blobs) == ({"$blob": [0, "str"]}, [b"text"])
    assert execution.result.duration_s == 1.5
    assert session.execute(request(), []) is execution  # posted again: nothing runs
    assert len(worker.headers) == 1


def test_the_worker_gets_the_request_without_what_is_the_brokers(session: Session, worker: NotingWorker) -> None:
    session.execute(request(timeout_s=3.0, tools=None, drop=("v1",)), [])
    assert worker.headers == [{"type": "execute", "execution_id": "e1", "code": "1", "variables": {}, "drop": ["v1"]}]


def test_a_second_execution_while_one_runs_is_refused(session: Session, worker: NotingWorker) -> None:
    session.execute(request("e1"), [])
    with pytest.raises(SessionBusy):
        session.execute(request("e2"), [])
    session.frame_received(result("e1"), [])
    session.execute(request("e2"), [])
    assert len(worker.headers) == 2


@pytest.mark.parametrize(
    "frame",
    [
        result("another"),
        {"type": "ready", "pid": 1},
        {"type": "nonsense"},
        {},
        {"type": "result"},
    ],
)
def test_frames_that_fit_no_running_execution_are_dropped(session: Session, frame: dict[str, Any]) -> None:
    execution = session.execute(request(), [])
    session.frame_received(frame, [])
    assert execution.running
    assert session.lost is None


def test_a_late_and_a_duplicate_result_change_nothing(session: Session) -> None:
    first = session.execute(request("e1"), [])
    session.frame_received(result("e1", value=1), [])
    session.frame_received(result("e1", value=2), [])
    second = session.execute(request("e2"), [])
    session.frame_received(result("e1", value=3), [])
    assert first.result is not None
    assert first.result.value == 1
    assert second.running


@pytest.mark.parametrize(
    "broken",
    [
        {"outcome": "worker_died"},
        {"outcome": "timed_out"},
        {"outcome": 7},
        {"outcome": "ok", "display": 5},
        {"outcome": "raised", "error": {"type": "X"}},
        {"outcome": "raised", "error": "text"},
    ],
)
def test_a_malformed_result_ends_the_session_as_protocol(
    session: Session, worker: NotingWorker, broken: dict[str, Any]
) -> None:
    execution = session.execute(request(), [])
    session.frame_received({**result(), **broken}, [])
    assert worker.killed
    assert session.lost == "protocol"
    assert execution.result is not None
    assert (execution.result.outcome, execution.result.session_lost) == (Outcome.WORKER_DIED, "protocol")


def test_at_the_deadline_comes_an_interrupt_and_the_namespace_lives(
    session: Session, worker: NotingWorker, clock: FakeClock
) -> None:
    execution = session.execute(request(timeout_s=5), [])
    assert session.next_deadline() == clock.now + 5
    clock.advance(4.999)
    session.tick()
    assert worker.interrupts == 0
    clock.advance(0.001)
    session.tick()
    assert worker.interrupts == 1
    session.interrupt_delivered()
    error = {"type": "KeyboardInterrupt", "message": "", "traceback": "line 1", "lineno": 1}
    session.frame_received(result(outcome="interrupted", error=error), [])
    assert execution.result is not None
    assert (execution.result.outcome, execution.result.session_lost) == (Outcome.TIMED_OUT, None)
    assert execution.result.error is not None
    assert (execution.result.error.type, execution.result.error.traceback) == ("ExecutionTimedOut", "line 1")
    assert session.execute(request("e2"), []).running


def test_code_that_ignores_the_interrupt_is_reminded_once_and_then_killed(
    session: Session, worker: NotingWorker, clock: FakeClock
) -> None:
    execution = session.execute(request(timeout_s=5), [])
    clock.advance(5)
    session.tick()
    assert session.next_deadline() == clock.now + limits.INTERRUPT_GRACE_S / 2
    clock.advance(limits.INTERRUPT_GRACE_S / 2)
    session.tick()
    assert worker.interrupts == 2
    assert session.next_deadline() == clock.now + limits.INTERRUPT_GRACE_S / 2
    clock.advance(limits.INTERRUPT_GRACE_S / 2)
    session.tick()
    assert worker.interrupts == 2
    assert worker.killed
    assert execution.result is not None
    assert (execution.result.outcome, execution.result.session_lost) == (Outcome.TIMED_OUT, "deadline")
    with pytest.raises(SessionLost) as lost:
        session.execute(request("e2"), [])
    assert lost.value.reason == "deadline"
    assert session.execute(request("e1"), []) is execution  # the stored reply is still there


def test_the_host_can_interrupt(session: Session, worker: NotingWorker) -> None:
    execution = session.execute(request(), [])
    session.interrupt(execution)
    session.interrupt(execution)
    assert worker.interrupts == 1
    session.interrupt_delivered()
    session.frame_received(result(outcome="interrupted"), [])
    assert execution.result is not None
    assert execution.result.outcome is Outcome.INTERRUPTED
    session.interrupt(execution)  # it has ended
    assert worker.interrupts == 1


def test_an_interrupt_that_came_too_late_leaves_the_result(session: Session) -> None:
    execution = session.execute(request(), [])
    session.interrupt(execution)
    session.interrupt_delivered()
    session.frame_received(result(outcome="submitted", value={"answer": 1}), [])
    assert execution.result is not None
    assert (execution.result.outcome, execution.result.value) == (Outcome.SUBMITTED, {"answer": 1})


def test_an_interrupt_still_on_its_way_cannot_hit_the_next_execution(session: Session, worker: NotingWorker) -> None:
    execution = session.execute(request(), [])
    session.interrupt(execution)
    session.frame_received(result(), [])
    assert execution.running
    with pytest.raises(SessionBusy):
        session.execute(request("e2"), [])
    session.interrupt_delivered()
    assert not execution.running
    session.execute(request("e2"), [])


def test_too_much_output_interrupts(session: Session, worker: NotingWorker) -> None:
    execution = session.execute(request(), [])
    session.output_overflowed()
    assert worker.interrupts == 1
    session.interrupt_delivered()
    session.frame_received(result(outcome="ok"), [])
    assert execution.result is not None
    assert execution.result.outcome is Outcome.OUTPUT_LIMIT


@pytest.mark.parametrize("reason", ["oom", "killed", "crashed(SIGSEGV)", "exited(0)"])
def test_the_workers_death_ends_the_execution_at_once_and_names_the_cause(session: Session, reason: str) -> None:
    execution = session.execute(request(), [])
    session.channel_closed()
    session.exited(reason)
    assert execution.result is not None
    assert (execution.result.outcome, execution.result.session_lost) == (Outcome.WORKER_DIED, reason)
    with pytest.raises(SessionLost, match=reason.replace("(", r"\(").replace(")", r"\)")):
        session.execute(request("e2"), [])


def test_a_worker_that_closes_its_channel_and_lives_is_killed(
    session: Session, worker: NotingWorker, clock: FakeClock
) -> None:
    execution = session.execute(request(), [])
    session.channel_closed()
    clock.advance(EXIT_REASON_WAIT_S)
    session.tick()
    assert worker.killed
    assert execution.result is not None
    assert execution.result.session_lost == "protocol"


def test_a_session_that_dies_between_executions_refuses_the_next(session: Session) -> None:
    session.exited("killed")
    with pytest.raises(SessionLost):
        session.execute(request(), [])


def test_only_the_running_executions_tools_can_be_called(session: Session) -> None:
    with pytest.raises(ExecutionEnded):
        session.submit(call(), [], 0)
    session.execute(request("e1"), [])
    with pytest.raises(UnknownTool, match="search"):
        session.submit(call(tool="rm"), [], 0)
    with pytest.raises(ExecutionEnded):
        session.submit(call("e0"), [], 0)
    session.submit(call("e1"), [], 0)
    session.frame_received(result("e1"), [])
    with pytest.raises(ExecutionEnded):
        session.submit(call("e1", key="again"), [], 0)


def test_tools_stay_until_they_are_changed(session: Session) -> None:
    for execution_id, tools, allowed in (("e1", (SEARCH,), True), ("e2", None, True), ("e3", (), False)):
        session.execute(request(execution_id, tools=tools), [])
        if allowed:
            session.submit(call(execution_id), [], 0)
        else:
            with pytest.raises(UnknownTool):
                session.submit(call(execution_id), [], 0)
        session.frame_received(result(execution_id), [])


def test_the_end_of_an_execution_cancels_its_calls(session: Session) -> None:
    session.execute(request(), [])
    waiting = session.submit(call(key="a"), [], 0)
    [held] = session.tool_calls.claim(limit=1, lease_s=60, start=True)
    session.frame_received(result(), [])
    assert waiting.state is held.state is CallState.CANCELLED
    with pytest.raises(CallGone):
        session.tool_calls.finish(held.call_id, ToolResult(attempt=1, value=1))


def test_at_the_deadline_open_calls_expire_and_new_ones_are_refused(session: Session, clock: FakeClock) -> None:
    session.execute(request(timeout_s=1), [])
    waiting = session.submit(call(), [], 0)
    clock.advance(1)
    session.tick()
    assert waiting.state is CallState.EXPIRED
    with pytest.raises(ExecutionEnded):
        session.submit(call(key="new"), [], 0)


def test_the_clock_stands_still_while_the_host_works_if_asked(
    session: Session, worker: NotingWorker, clock: FakeClock
) -> None:
    session.execute(request(timeout_s=5, timeout_includes_tools=False), [])
    clock.advance(2)
    first, second = session.submit(call(key="a"), [], 0), session.submit(call(key="b"), [], 0)
    session.tool_calls.claim(limit=2, lease_s=10_000, start=True)
    clock.advance(3600)
    session.tick()
    session.tool_calls.finish(first.call_id, ToolResult(attempt=1))
    clock.advance(3600)
    session.tick()
    assert worker.interrupts == 0
    session.tool_calls.finish(second.call_id, ToolResult(attempt=1))
    assert session.next_deadline() == clock.now + 3
    clock.advance(3)
    session.tick()
    assert worker.interrupts == 1


def test_the_clock_runs_on_in_tools_by_default(session: Session, worker: NotingWorker, clock: FakeClock) -> None:
    session.execute(request(timeout_s=5), [])
    session.submit(call(), [], 0)
    session.tool_calls.claim(limit=1, lease_s=100, start=True)
    clock.advance(5)
    session.tick()
    assert worker.interrupts == 1


def test_a_lost_lease_is_noticed_without_anybody_asking(session: Session, clock: FakeClock) -> None:
    session.execute(request(), [])
    waiting = session.submit(call(), [], 0)
    session.tool_calls.claim(limit=1, lease_s=7, start=True)
    assert session.next_deadline() == clock.now + 7
    clock.advance(7)
    session.tick()
    assert waiting.orphaned
    assert session.next_deadline() == clock.now + limits.ATTACH_GRACE_S
    clock.advance(limits.ATTACH_GRACE_S)
    session.tick()
    assert waiting.state is CallState.UNKNOWN
    assert session.next_deadline() is None


def test_closing_ends_the_execution_and_kills(session: Session, worker: NotingWorker) -> None:
    execution = session.execute(request(), [])
    session.close()
    session.close()
    assert worker.killed
    assert execution.result is not None
    assert execution.result.session_lost == "shutdown"


def test_old_replies_are_forgotten_by_number_and_by_size(session: Session) -> None:
    for n in range(limits.STORED_EXECUTIONS + 1):
        session.execute(request(f"e{n}"), [])
        session.frame_received(result(f"e{n}"), [])
    with pytest.raises(UnknownExecution):
        session.find("e0")
    assert session.find("e1") is not None
    for n in range(3):
        session.execute(request(f"large{n}"), [])
        session.frame_received(result(f"large{n}", value={"$blob": [0, "bytes"]}), [bytes(40 << 20)])
    session.execute(request("last"), [])
    with pytest.raises(UnknownExecution):
        session.find("large1")
    assert session.find("large2") is not None


def test_displayed_text_is_bounded(session: Session) -> None:
    execution = session.execute(request(), [])
    session.frame_received(result(display="x" * (limits.MAX_DISPLAY_CHARS + 1)), [])
    assert execution.result is not None
    assert execution.result.display is not None
    assert len(execution.result.display) == limits.MAX_DISPLAY_CHARS
