"""``snapshot``, ``rollback`` and ``fork`` of an interpreter, with real workers; the rest with a scripted broker."""

from __future__ import annotations

import copy
import datetime
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from broker.protocol import limits
from broker.testing import InProcessBroker
from host_client import SandboxInterpreter, ScriptedBroker, tool
from host_client.broker_client import SessionInfo
from host_client.errors import BadSetting, SandboxError, SessionBusy, SessionLost, TooManySnapshots, UnknownSnapshot
from host_client.providers.fake import FakeProvider
from host_client.scripted_steps import Step
from host_client.sharing import Share
from host_client.value_keeper import ValueKeeper

Make = Callable[..., SandboxInterpreter]


@pytest.fixture(scope="module")
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as box:
        yield box


@pytest.fixture
def make(broker: InProcessBroker) -> Iterator[Make]:
    made: list[SandboxInterpreter] = []

    def make(**keywords: Any) -> SandboxInterpreter:
        made.append(SandboxInterpreter(provider=FakeProvider(broker), **{"execution_timeout_s": 60.0, **keywords}))
        return made[-1]

    yield make
    for interpreter in made:
        interpreter.shutdown()


def test_a_snapshot_says_what_it_is_and_a_with_drops_it(make: Make) -> None:
    session = make()
    session.execute("import threading; s = threading.Event(); threading.Thread(target=s.wait, daemon=True).start()")
    with session.snapshot("before") as snapshot:
        assert (snapshot.name, snapshot.session_id) == ("before", session.session_id)
        assert abs(datetime.datetime.now(datetime.timezone.utc) - snapshot.taken_at) < datetime.timedelta(minutes=1)
        [thread] = snapshot.not_kept
        assert thread.startswith("thread ")
        assert session.snapshots() == [snapshot]
    assert session.snapshots() == []
    snapshot.drop()


def test_values_by_reference_stay_right_across_rollbacks(make: Make) -> None:
    session = make()
    old, new = "a" * (limits.KEEP_THRESHOLD_BYTES + 1), "b" * (limits.KEEP_THRESHOLD_BYTES + 1)
    assert session.execute("x[0]", {"x": old}) == "a"
    snapshot = session.snapshot()
    assert session.execute("x[0]", {"x": new}) == "b"  # the old one is dropped with this one
    assert session.execute("x[0], y[0]", {"x": new, "y": old}) == ["b", "a"]
    session.rollback(snapshot)
    assert session.execute("x[0]") == "a"
    for x, y in ((old, new), (new, old), (new, new), (old, old)):
        assert session.execute("x[0] + y[0]", {"x": x, "y": y}) == x[0] + y[0]
    session.rollback(snapshot)
    assert session.execute("x[0] + y[0]", {"x": new, "y": new}) == "bb"


def test_values_by_reference_are_known_to_branches(make: Make) -> None:
    session = make()
    text = "a" * (limits.KEEP_THRESHOLD_BYTES + 1)
    session.execute("x[0]", {"x": text})
    [branch] = session.fork()
    assert branch.execute("x[0]", {"x": text, "z": "b" * len(text)}) == "a"
    assert session.execute("z[0]", {"z": "c" * len(text)}) == "c"
    assert branch.execute("z[0]") == "b"
    branch.shutdown()


def test_tools_and_fields_after_a_rollback_are_those_of_now(make: Make) -> None:
    session = make(tools={"first": lambda: 1})
    session.execute("first()")
    snapshot = session.snapshot()
    session.tools["second"] = lambda: 2
    del session.tools["first"]
    assert session.execute("second()") == 2
    session.rollback(snapshot)
    assert session.execute("second()") == 2
    assert session.execute("'first' in globals()") is False
    session.output_fields = [{"name": "answer", "type": "int"}]
    session.rollback(snapshot)
    assert session.execute("SUBMIT(answer=second())").output == {"answer": 2}


def test_branches_call_tools_at_the_same_time_each_with_its_own_result(make: Make) -> None:
    together = threading.Barrier(4, timeout=30)

    def meet(who: str) -> str:
        together.wait()
        return who.upper()

    session = make(tools={"meet": meet})
    session.execute("name = 'parent'")
    branches = session.fork(3)
    results: dict[int, Any] = {}

    def run(number: int, interpreter: SandboxInterpreter) -> None:
        results[number] = interpreter.execute("print(me); meet(me)", {"me": f"b{number}"})

    threads = [threading.Thread(target=run, args=each) for each in enumerate([session, *branches])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: f"B{number}" for number in range(4)}
    assert [branch.last_result.output for branch in branches if branch.last_result] == ["b1\n", "b2\n", "b3\n"]
    session.shutdown()
    assert [branch.execute("name") for branch in branches] == ["parent"] * 3
    for branch in branches:
        branch.shutdown()


def test_neither_while_code_runs(make: Make) -> None:
    refused: list[str] = []

    def inside() -> None:
        for action in (session.fork, session.snapshot, lambda: session.rollback(snapshot)):
            with pytest.raises(SandboxError) as caught:
                action()
            refused.append(caught.value.code)

    session = make(tools={"inside": inside})
    snapshot = session.snapshot()
    session.execute("inside()")
    assert refused == [SessionBusy.code] * 3


def test_what_is_no_snapshot_of_the_session_is_refused_by_name(make: Make) -> None:
    session, other = make(), make()
    session.execute("x = 1")
    theirs = other.snapshot("theirs")
    with pytest.raises(UnknownSnapshot) as caught:
        session.rollback(theirs)
    assert all(part in str(caught.value) for part in ("theirs", str(session.session_id), str(other.session_id)))
    dropped = session.snapshot("gone")
    dropped.drop()
    with pytest.raises(UnknownSnapshot, match=f"'gone' of the session {session.session_id} was dropped"):
        session.rollback(dropped)
    with pytest.raises(BadSetting, match="str"):
        session.rollback("theirs")  # type: ignore[arg-type]
    [branch] = session.fork()
    mine = session.snapshot()
    with pytest.raises(UnknownSnapshot):
        branch.rollback(mine)
    assert session.execute("x") == branch.execute("x") == 1
    branch.shutdown()


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "2", limits.MAX_FAMILY])
def test_a_count_that_cannot_be_is_refused(make: Make, count: Any) -> None:
    with pytest.raises(BadSetting, match="fork"):
        make().fork(count)


@pytest.mark.parametrize("name", ["", "x" * 65, 5, "a\nb"])
def test_a_name_that_cannot_be_is_refused(make: Make, name: Any) -> None:
    with pytest.raises(BadSetting, match="name"):
        make().snapshot(name)


def test_the_bound_on_snapshots_names_itself_and_what_helps(make: Make) -> None:
    session = make()
    kept = [session.snapshot() for _ in range(limits.MAX_SNAPSHOTS)]
    with pytest.raises(TooManySnapshots, match=rf"{limits.MAX_SNAPSHOTS} snapshots.*drop\(\)"):
        session.snapshot()
    kept[0].drop()
    session.snapshot()


def test_a_lost_session_is_not_brought_back(make: Make) -> None:
    session = make()
    snapshot = session.snapshot()
    with pytest.raises(SessionLost):
        session.execute("import os; os._exit(1)")
    for action in (session.fork, session.snapshot, lambda: session.rollback(snapshot)):
        with pytest.raises(SessionLost):
            action()
    snapshot.drop()


def test_after_attach_all_of_it_works_and_the_older_clients_snapshots_are_there(make: Make) -> None:
    older = make(session="forked-novel")
    older.execute("x = [1]", {"text": "a" * (limits.KEEP_THRESHOLD_BYTES + 1)})
    old = older.snapshot("old")
    newer = make(attach="forked-novel")
    newer.execute("x.append(2)")
    [found] = newer.snapshots()
    assert (found.name, found.snapshot_id) == ("old", old.snapshot_id)
    newer.rollback(found)
    assert newer.execute("x, text[0], more[0]", {"more": "b" * (limits.KEEP_THRESHOLD_BYTES + 1)}) == [[1], "a", "b"]
    [branch] = newer.fork()
    assert branch.execute("x") == [1]
    branch.shutdown()
    with pytest.raises(SessionLost):
        older.rollback(old)


def test_a_branch_can_be_attached_to_by_its_id(make: Make) -> None:
    session = make()
    session.execute("x = 1")
    [branch] = session.fork()
    branch.execute("x = 2")
    newer = make(attach=branch.session_id)
    assert newer.execute("x") == 2
    with pytest.raises(SessionLost) as caught:
        branch.execute("x")
    assert caught.value.reason == "fenced"
    assert session.execute("x") == 1


def test_a_copy_of_a_branch_is_a_fresh_interpreter(make: Make) -> None:
    session = make()
    session.execute("x = 1")
    [branch] = session.fork()
    fresh = copy.deepcopy(branch)
    assert fresh.execute("'x' in globals()") is False
    fresh.shutdown()
    branch.shutdown()


def test_marks_of_tools_hold_in_branches(make: Make) -> None:
    @tool(idempotent=True)
    def look(n: int) -> int:
        return n + 1

    session = make(tools=[look])
    session.execute("look(1)")
    [branch] = session.fork()
    assert branch.execute("look(2)") == 3
    branch.shutdown()


def test_the_scripted_broker_forks_and_rolls_back() -> None:
    text = "a" * (limits.KEEP_THRESHOLD_BYTES + 1)
    script = ScriptedBroker([lambda execution: Step(value=execution.variables["x"][0])] * 3)
    with SandboxInterpreter(provider=script) as session:
        assert session.execute("x", {"x": text}) == "a"
        snapshot = session.snapshot()
        session.rollback(snapshot)
        assert session.execute("x", {"x": text}) == "a"
        [branch] = session.fork()
        assert branch.execute("x", {"x": text}) == "a"
        snapshot.drop()
        with pytest.raises(UnknownSnapshot):
            session.rollback(snapshot)
        session.shutdown()
        assert script.stopped == 0
        branch.shutdown()
    assert script.stopped == 1


def test_ids_of_kept_values_are_never_used_again() -> None:
    keeper = ValueKeeper()
    first = keeper.added("a")
    keeper.settle(arrived=True)
    state = keeper.state()
    second = keeper.added("b")
    keeper.settle(arrived=True)
    keeper.go_back(state)
    assert keeper.known("a") == first
    assert keeper.known("b") is None
    assert keeper.added("b") not in (first, second)
    assert keeper.copy().added("c") not in (first, second)


def test_the_last_one_of_a_sandbox_is_told_so_once() -> None:
    share = Share("s-1", 1)
    share.join("s-2")
    share.join("s-3")
    assert [share.leave() for _ in range(3)] == [False, False, True]
    info = [SessionInfo("s-1", None, 1, None), SessionInfo("s-2", None, 1, None)]
    assert not share.wanted_by_others(info)
    assert share.wanted_by_others([*info[:1], SessionInfo("s-2", None, 2, None)])  # attached to
    assert share.wanted_by_others([SessionInfo("s-9", None, 1, None)])  # somebody's
    assert not share.wanted_by_others([SessionInfo("s-9", None, 1, "killed")])
