"""Claims about the lane as a user of the interpreter sees it: nothing but the time that an execution takes."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from broker.errors import TooManyCalls
from broker.protocol.messages import CallState
from broker.session import Session
from broker.testing import InProcessBroker
from broker.tool_calls import ToolCallQueue
from host_client import SandboxInterpreter, SandboxSettings, lane
from host_client.dspy_compat import contract
from host_client.errors import SessionLost
from host_client.lane import Lane
from host_client.providers.fake import FakeProvider

SETTINGS = SandboxSettings(journal=":memory:", history=False)
#: What hostile code would do: everything in its process is its own.
FIND_LANE = "import gc\nlane = next(o for o in gc.get_objects() if type(o).__name__ == 'Inbox')._lane\n"
FORGE = FIND_LANE + (
    "from broker.protocol.frames import dump_frame\n"
    "import sys\n"
    "worker = next(o for o in gc.get_objects() if type(o).__name__ == 'Worker')\n"
    "header = {'execution_id': worker._current.execution.execution_id, 'outcome': 'ok', 'value': 'forged'}\n"
    "lane._sock.send(b''.join(dump_frame(header)))\n"
)


class Taken:
    """Counts the executions that the worker itself has answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        run = Lane.run

        def counted(lane: Lane, *args: Any) -> Any:
            found = run(lane, *args)
            self.count += found is not None
            return found

        monkeypatch.setattr(Lane, "run", counted)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    return Taken(monkeypatch)


@pytest.fixture(scope="module")
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as started:
        yield started


@pytest.fixture
def warm(broker: InProcessBroker) -> Iterator[SandboxInterpreter]:
    """One with a lane."""
    tools = {"double": lambda n: 2 * n}
    with SandboxInterpreter(tools, provider=FakeProvider(broker), settings=SETTINGS, execution_timeout_s=20) as made:
        made.execute("1")
        made.execute("1")
        yield made


def until_nothing_is_held(broker: InProcessBroker, interpreter: SandboxInterpreter) -> None:
    """Wait until the broker, which reads of the lane now and then, has let go of every file."""
    assert interpreter._session is not None
    session = broker.daemon.sessions[interpreter._session.session_id]
    give_up_at = time.monotonic() + 20
    while len(session.core.files):
        assert time.monotonic() < give_up_at
        os.sched_yield()


def until_taken(interpreter: SandboxInterpreter, taken: Taken, code: str) -> Any:
    """Execute until the worker has answered once: on a busy machine the broker may be asked first."""
    before = taken.count
    for _ in range(200):
        value = interpreter.execute(code)
        if taken.count > before:
            return value
    raise AssertionError("the lane was never used")


def test_values_errors_and_submissions_are_the_same(warm: SandboxInterpreter, taken: Taken) -> None:
    error = contract().code_error
    assert until_taken(warm, taken, "[1, 'two', 3.5, None]") == [1, "two", 3.5, None]
    assert warm.last_result is not None
    assert warm.last_result.duration_s > 0
    assert until_taken(warm, taken, "x = 10**30\nx") == 10**30
    assert until_taken(warm, taken, "'long' * 5_000") == "long" * 5_000
    for _ in range(5):
        with pytest.raises(error, match="ZeroDivisionError"):
            warm.execute("1/0")
        with pytest.raises(SyntaxError):
            warm.execute("1 +")
        assert warm.execute("SUBMIT(answer=4)").output == {"answer": 4}
    assert warm.execute("x") == 10**30


def test_variables_and_new_tools_arrive(warm: SandboxInterpreter) -> None:
    text = "t" * 20_000
    for _ in range(3):
        assert warm.execute("len(text)", {"text": text}) == 20_000
    warm.tools["triple"] = lambda n: 3 * n
    assert warm.execute("triple(n) + double(n)", {"n": 2}) == 10
    del warm.tools["triple"]
    with pytest.raises(contract().code_error, match="NameError"):
        warm.execute("triple(1)")


def test_a_little_output_comes_on_the_lane_and_much_of_it_as_well_as_ever(
    warm: SandboxInterpreter, taken: Taken
) -> None:
    assert until_taken(warm, taken, "print('é' * 100)") == "é" * 100
    assert until_taken(warm, taken, "import sys; print('o'); print('e', file=sys.stderr)") == "o\ne"
    for count in (1, 500, 8_000, 8_500, 20_000, 45_000):
        assert warm.execute(f"print('é' * {count})") == "é" * count
    assert warm.execute("for n in range(30_000): print(n)").startswith("0\n1\n")
    warm.execute("import os")
    assert warm.execute("os.system('echo from elsewhere'); None") == "from elsewhere"


def test_large_variables_come_in_a_file_by_the_lane(
    warm: SandboxInterpreter, broker: InProcessBroker, taken: Taken
) -> None:
    before = taken.count
    for number in range(10):
        text = f"{number}" + "é" * 300_000
        for value in (text, text.encode(), [text[:200_000], text[200_000:]], text * 10, text.replace("é", "e")):
            ends = warm.execute("[len(value), str(value[0])[:9], str(value[-1:])[-9:]]", {"value": value})
            assert ends == [len(value), str(value[0])[:9], str(value[-1:])[-9:]]
    assert taken.count > before
    until_nothing_is_held(broker, warm)


def test_large_variables_arrive_where_the_code_takes_longer_or_the_lane_breaks(
    warm: SandboxInterpreter, broker: InProcessBroker
) -> None:
    opened = len(os.listdir("/proc/self/fd"))
    for number in range(6):
        text = str(number) * 300_000
        assert warm.execute("import time; time.sleep(0.06); text[0]", {"text": text}) == str(number)
        assert warm.execute("print(text[-1])") == str(number)
        broken = {"text": text + "!"}
        assert warm.execute(FIND_LANE + "if lane: lane._sock.shutdown(2)\ntext[-1]", broken) == "!"
        until_nothing_is_held(broker, warm)
    warm.execute("1")
    assert len(os.listdir("/proc/self/fd")) <= opened + 8


def test_the_limit_of_output_holds_on_the_lane(broker: InProcessBroker) -> None:
    settings = dataclasses.replace(SETTINGS, max_output_bytes=1024)
    with SandboxInterpreter(provider=FakeProvider(broker), settings=settings, execution_timeout_s=20) as made:
        for _ in range(20):
            made.execute("print('x' * 1023)")
            assert made.last_result is not None
            assert (made.last_result.output, made.last_result.discarded_output_bytes) == ("x" * 1023 + "\n", 0)
            made.execute("print('x' * 2000)")
            assert (made.last_result.output, made.last_result.discarded_output_bytes) == ("x" * 1024, 977)


def test_output_and_tool_calls_are_not_lost(warm: SandboxInterpreter) -> None:
    for number in range(20):
        assert warm.execute(f"print({number})") == f"{number}"
        assert warm.execute(f"double({number})") == 2 * number


def test_what_is_printed_is_of_its_execution_where_the_broker_lags_behind(
    warm: SandboxInterpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = Session.frame_received

    def later(session: Session, *frame: Any) -> None:
        time.sleep(0.04)  # meanwhile the host has sent the next one, and that has printed
        received(session, *frame)

    monkeypatch.setattr(Session, "frame_received", later)
    for number in range(10):
        assert warm.execute("1") == 1
        assert warm.execute(f"print({number})") == f"{number}"


@pytest.mark.parametrize("count", [3_000, 6_000, 13_500, 60_000])
def test_larger_executions_arrive_whichever_way_also_where_the_broker_lags_behind(
    warm: SandboxInterpreter, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    numbers = list(range(count))
    execute = Session.execute

    def later(session: Session, *args: Any, **keywords: Any) -> Any:
        time.sleep(0.02)
        return execute(session, *args, **keywords)

    monkeypatch.setattr(Session, "execute", later)
    for number in range(4):
        assert warm.execute("len(numbers)", {"numbers": [*numbers, number]}) == count + 1
        assert warm.execute(f"{number}  # {'x' * count * 5}") == number


def test_a_slow_end_of_an_execution_mixes_up_no_descriptors(warm: SandboxInterpreter) -> None:
    slow = (
        "import sys, time\n"
        "class Slow:\n"
        "    def __init__(self, to): self.to = to\n"
        "    def write(self, text): return self.to.write(text)\n"
        "    def flush(self): time.sleep(0.05); self.to.flush()\n"
    )
    for number in range(3):
        warm.execute(slow + "time.sleep(0.036)\nsys.stdout = Slow(sys.stdout)\nprint('x')")
        assert warm.execute(f"print({number})") == f"{number}"
        warm.execute(slow + "time.sleep(0.036)\nsys.stdout = Slow(sys.stdout)")
        assert warm.execute("print(len(text))", {"text": "y" * (200_000 + number)}) == f"{200_000 + number}"
        warm.execute(slow + "time.sleep(0.036)\nsys.stdout = Slow(sys.stdout)")
        warm.snapshot().drop()


def test_what_the_worker_says_late_the_broker_is_asked_for(
    warm: SandboxInterpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm.execute("runs = 0")
    monkeypatch.setattr(lane, "_TRUSTED_S", 0.0)
    for number in range(1, 4):
        assert warm.execute("runs += 1\nruns") == number


def test_garbage_on_the_lane_ends_the_lane_and_nothing_else(warm: SandboxInterpreter, taken: Taken) -> None:
    lanes: Any = warm._session.client._lanes  # type: ignore[union-attr]
    warm.execute("runs = 0")
    number = 0
    while lanes._breaks < 5:
        number += 1
        assert warm.execute(FIND_LANE + "runs += 1\nif lane: lane._sock.send(b'\\xff' * 64)\nruns") == number
        assert warm.execute("runs") == number
        assert number < 100
    before = taken.count
    assert warm.execute("runs") == number
    assert taken.count == before  # five times were enough


def test_a_lane_that_code_closes_is_made_anew(warm: SandboxInterpreter, taken: Taken) -> None:
    for _ in range(2):
        assert warm.execute(FIND_LANE + "lane._sock.shutdown(2)\n5") == 5
        assert until_taken(warm, taken, "6") == 6


def test_a_forged_result_is_the_forgers_own_and_its_deadline_holds(broker: InProcessBroker) -> None:
    provider = FakeProvider(broker)
    with SandboxInterpreter(provider=provider, settings=SETTINGS, execution_timeout_s=1.5) as interpreter:
        for _ in range(3):
            interpreter.execute("1")
        assert interpreter.execute(FORGE + "while True: pass") == "forged"
        # What ran on may strike the next one, which is the forger's own.
        outcome: Any = "next"
        try:
            outcome = interpreter.execute("'next'")
        except SessionLost as lost:
            outcome = lost.reason
        assert outcome in ("next", "deadline")


def test_ctrl_c_stops_what_came_on_the_lane_and_keeps_the_session(warm: SandboxInterpreter, taken: Taken) -> None:
    until_taken(warm, taken, "kept = 3\nkept")
    warm.tools["press"] = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        warm.execute("press()\nwhile True: pass")
    assert warm.execute("kept") == 3
    assert until_taken(warm, taken, "kept") == 3


def test_shutdown_from_another_thread_ends_what_came_on_the_lane(warm: SandboxInterpreter) -> None:
    warm.tools["stop"] = lambda: threading.Thread(target=warm.shutdown).start()
    with pytest.raises(SessionLost) as caught:
        warm.execute("stop()\nwhile True: pass")
    assert caught.value.reason == "shutdown"


def test_without_descriptors_there_is_no_lane_and_nothing_else_changes(
    warm: SandboxInterpreter, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lane, "open", lambda exchange, path: None)
    warm._session.client._lanes._drop()  # type: ignore[union-attr]
    assert [warm.execute(f"{number}") for number in range(5)] == list(range(5))
    assert taken.count == 0


def test_a_forked_child_leaves_the_parents_lane_alone(warm: SandboxInterpreter, taken: Taken) -> None:
    until_taken(warm, taken, "1")
    child = os.fork()
    if child == 0:
        os._exit(0 if warm._session.client._lanes._ready("another", "x&epoch=1") is None else 1)  # type: ignore[union-attr]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert until_taken(warm, taken, "2") == 2


def test_descriptors_do_not_add_up(broker: InProcessBroker) -> None:
    def rounds(count: int) -> int:
        for _ in range(count):
            with SandboxInterpreter(provider=FakeProvider(broker), settings=SETTINGS) as made:
                for _ in range(3):
                    made.execute("1")
        return len(os.listdir("/proc/self/fd"))

    before = rounds(3)
    give_up_at = time.monotonic() + 20
    while rounds(10) > before + 3:  # the last ones are closed in the background
        assert time.monotonic() < give_up_at


def test_a_loop_may_make_more_calls_than_can_be_open_at_once(
    warm: SandboxInterpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    begun = ToolCallQueue.begun

    def noted(queue: ToolCallQueue, call_id: str, *args: Any, **keywords: Any) -> Any:
        try:
            return begun(queue, call_id, *args, **keywords)
        except TooManyCalls:
            refused.append(call_id)
            raise

    monkeypatch.setattr(ToolCallQueue, "begun", noted)
    assert warm.execute("sum(double(n) for n in range(12_000))") == 12_000 * 11_999
    assert warm.execute("double(4)") == 8
    assert refused == []


def test_calls_of_many_threads_come_back_to_those_who_made_them(warm: SandboxInterpreter) -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(200) as threads:\n"
        "    found = list(threads.map(double, range(2_000)))\n"
        "found == [2 * n for n in range(2_000)]"
    )
    for _ in range(3):
        assert warm.execute(code) is True


CALLS = "[double(n) for n in range(20)]"


class Called:
    """Counts the tool calls that were answered on the lane."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        answer = Lane.answer

        def counted(lane: Lane, *args: Any) -> bool:
            told = answer(lane, *args)
            self.count += told
            return told

        monkeypatch.setattr(Lane, "answer", counted)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    return Called(monkeypatch)


def test_tool_calls_are_answered_on_the_lane(warm: SandboxInterpreter, called: Called) -> None:
    for _ in range(5):
        assert warm.execute(CALLS) == [2 * n for n in range(20)]
    assert called.count > 0


@pytest.mark.parametrize("size", [1, 4_000, 4_100, 32_300, 32_500, 32_700, 33_000, 300_000])
def test_arguments_and_results_of_any_size_arrive(warm: SandboxInterpreter, size: int) -> None:
    warm.tools["echo"] = lambda value: value
    for _ in range(3):
        assert warm.execute(f"[echo('x' * {size}), echo([7] * ({size} // 2)) == [7] * ({size} // 2)]") == [
            "x" * size,
            True,
        ]


def test_values_that_json_lacks_and_errors_arrive(warm: SandboxInterpreter) -> None:
    def fail(text: str) -> None:
        raise ValueError(text)

    warm.tools["echo"], warm.tools["fail"] = lambda value: value, fail
    code = "[repr(echo(value)) == repr(value) for value in (float('nan'), 10**50, [1, b'x'], {'a': None})]"
    assert warm.execute(code) == [True] * 4
    assert warm.execute("echo(10**3000) == 10**3000") is True
    code = "try: fail('y' * {0})\nexcept ValueError as error: seen = len(str(error))\nseen"
    assert [warm.execute(code.format(size)) for size in (5, 5_000, 40_000)] == [5, 5_000, 40_000]


def test_a_tool_that_takes_long_is_waited_for(warm: SandboxInterpreter) -> None:
    warm.tools["slow"] = lambda: time.sleep(0.1) or "late"
    for _ in range(3):
        assert warm.execute("slow()") == "late"


def test_no_more_tools_run_at_once_than_may(broker: InProcessBroker) -> None:
    now, most, lock = 0, 0, threading.Lock()

    def busy(number: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.001)
        with lock:
            now -= 1
        return number

    settings = SandboxSettings(journal=":memory:", history=False, max_concurrent_tools=1)
    code = (
        "import threading\n"
        "threads = [threading.Thread(target=lambda: [busy(n) for n in range(5)]) for _ in range(3)]\n"
        "for thread in threads: thread.start()\n"
        "found = [busy(n) for n in range(8)]\n"
        "for thread in threads: thread.join()\n"
        "found"
    )
    with SandboxInterpreter({"busy": busy}, provider=FakeProvider(broker), settings=settings) as interpreter:
        for _ in range(12):
            assert interpreter.execute(code) == list(range(8))
    assert most == 1


def test_a_tool_may_execute_in_another_session_and_calls_there_go_by_the_lane_too(
    broker: InProcessBroker, warm: SandboxInterpreter
) -> None:
    with SandboxInterpreter({"triple": lambda n: 3 * n}, provider=FakeProvider(broker), settings=SETTINGS) as other:
        warm.tools["nested"] = lambda n: other.execute(f"triple({n})")
        for number in range(5):
            assert warm.execute(f"nested({number}) + double(1)") == 3 * number + 2


@pytest.mark.parametrize("includes", [True, False])
def test_the_time_of_tools_on_the_lane_counts_as_asked_for(broker: InProcessBroker, includes: bool) -> None:
    tools = {"slow": lambda: time.sleep(1.3)}
    provider, settings = FakeProvider(broker), dataclasses.replace(SETTINGS, timeout_includes_tools=includes)
    with SandboxInterpreter(tools, provider=provider, settings=settings, execution_timeout_s=1.0) as interpreter:
        interpreter.execute("1")
        if includes:
            with pytest.raises(contract().code_error, match="ExecutionTimedOut"):
                interpreter.execute("slow()")
        else:
            assert interpreter.execute("slow(); 5") == 5


def test_forked_children_threads_and_event_loops_call_tools_while_the_main_thread_does(
    warm: SandboxInterpreter,
) -> None:
    code = (
        "import asyncio, os, threading\n"
        "found = []\n"
        "threads = [threading.Thread(target=lambda n=n: found.append(double(n))) for n in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(double(8))\n"
        "async def both(): return await asyncio.gather(asyncio.to_thread(double, 10), asyncio.sleep(0, double(11)))\n"
        "mine = [double(9), *asyncio.run(both())]\n"
        "for thread in threads: thread.join()\n"
        "[sorted(found), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), mine]"
    )
    for _ in range(3):
        assert warm.execute(code) == [[0, 2, 4, 6], 16, [18, 20, 22]]


def test_a_tool_that_is_gone_is_refused_however_often_and_the_session_lives(warm: SandboxInterpreter) -> None:
    warm.tools["triple"] = lambda n: 3 * n
    warm.execute("kept = triple")
    del warm.tools["triple"]
    code = (
        "said = set()\n"
        "for _ in range(150):\n"
        "    try: kept(1)\n"
        "    except Exception as error: said.add(str(error))\n"
        "list(said)"
    )
    [said] = warm.execute(code)
    assert said.startswith("there is no tool 'triple'")


def test_branches_call_tools_and_leave_nothing_open(warm: SandboxInterpreter) -> None:
    listing = "import os\nlen(os.listdir('/proc/self/fd'))"
    warm.execute("double(1)")
    counts = []
    for _ in range(3):
        [branch] = warm.fork(1)
        with branch:
            assert [branch.execute("print('x')"), branch.execute("double(2)"), branch.execute("1")] == ["x", 4, 1]
            counts.append(branch.execute(listing))
            assert warm.execute("double(3)") == 6
    assert counts[0] == counts[-1]


def test_calls_of_many_executions_leave_nothing_behind(warm: SandboxInterpreter) -> None:
    lanes: Any = warm._session.client._lanes  # type: ignore[union-attr]
    for number in range(100):
        assert warm.execute(f"double({number})") == 2 * number
    assert lanes._calls == {}


FORGE_CALL = FIND_LANE + (
    "from broker.protocol.frames import dump_frame\n"
    "worker = next(o for o in gc.get_objects() if type(o).__name__ == 'Worker')\n"
    "def forge(key, tool='double', number=1):\n"
    "    header = {'type': 'call', 'key': key, 'execution_id': worker._current.execution.execution_id, 'tool': tool}\n"
    "    return b''.join(dump_frame({**header, 'args': [number], 'kwargs': {}}))\n"
)


def test_a_call_that_is_told_twice_runs_once(warm: SandboxInterpreter) -> None:
    runs: list[int] = []
    warm.tools["count"] = runs.append
    for number in range(5):  # one of the execution before may still run
        code = (
            f"twice = forge('abc', 'count', {number})\n"
            "if lane: lane._sock.send(twice * 5); worker._channel._sock.send(twice)\n1"
        )
        assert warm.execute(FORGE_CALL + code) == 1
    assert len(runs) == len(set(runs))


def test_the_broker_knows_how_each_call_ended_whatever_else_comes_on_the_lane(
    warm: SandboxInterpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    unanswered: list[str] = []
    close = ToolCallQueue.close

    def noted(queue: ToolCallQueue, state: CallState) -> None:
        unanswered.extend(queue._open)
        close(queue, state)

    monkeypatch.setattr(ToolCallQueue, "close", noted)
    chosen = random.Random(0)
    for number in range(400):
        code, value = chosen.choice(
            [
                (f"double({number})", 2 * number),
                (f"{number} + 1", number + 1),
                (f"print({number})", str(number)),
                (f"[double(n) for n in range({number % 30})]", [2 * n for n in range(number % 30)]),
                (f"import time\ntime.sleep({number % 40 / 1000})\ndouble({number})", 2 * number),
            ]
        )
        assert warm.execute(code) == value
    assert unanswered == []
