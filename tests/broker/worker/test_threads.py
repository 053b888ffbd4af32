"""Threads and tasks: those that an ended execution left behind reach into no later one."""

from __future__ import annotations

import threading

import pytest

from tests.broker.worker.harness import GuestPlane, WorkerProcess, tool

# A thread that waits for `go`, then prints and calls the tool; what happened is in `seen`.
LATE = """
import threading, _thread
go, done, seen = threading.Event(), threading.Event(), []
def late():
    go.wait()
    print('LATE')
    import sys
    sys.stdout.buffer.write(b'LATE')
    try:
        seen.append(probe())
    except RuntimeError as error:
        seen.append(str(error))
    done.set()
"""
STARTS = {
    "thread": "threading.Thread(target=late, daemon=True).start()",
    "raw thread": "_thread.start_new_thread(late, ())",
    "thread of a thread": (
        "t = threading.Thread(target=lambda: threading.Thread(target=late).start())\nt.start(); t.join()"
    ),
    "timer": "threading.Timer(0, late).start()",
    "pool": "from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor().submit(late)",
}


@pytest.mark.parametrize("start", STARTS.values(), ids=list(STARTS))
def test_leftover_thread_neither_prints_nor_calls_tools(worker: WorkerProcess, plane: GuestPlane, start: str) -> None:
    plane.tools["probe"] = lambda: "called"
    worker.execute(LATE + start, tools=[tool("probe")])
    result = worker.execute("go.set(); done.wait(); print('mine'); seen[0]")
    assert result.output == "mine\n"
    assert result.value.startswith("probe() was called by a thread that belongs to an execution that has ended")
    assert "start threads inside the execution that uses them" in result.value
    assert plane.requests == []


def test_thread_started_by_a_leftover_thread_is_a_leftover_too(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["probe"] = lambda: "called"
    relay = "\nfirst = threading.Event()\ndef relay():\n    first.wait()\n    threading.Thread(target=late).start()\n"
    worker.execute(LATE + relay + "threading.Thread(target=relay).start()", tools=[tool("probe")])
    result = worker.execute("first.set(); go.set(); done.wait(); seen[0]")
    assert "has ended" in result.value
    assert result.output == ""


def test_threads_of_the_running_execution_print_and_call_tools(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["probe"] = lambda: "called"
    worker.execute("x = 1", tools=[tool("probe")])
    result = worker.execute(LATE + "go.set()\nthreading.Thread(target=late).start(); done.wait(); seen[0]")
    assert result.value == "called"
    assert result.output == "LATE\nLATE"


def test_pool_kept_over_executions_works_for_whoever_submits(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["probe"] = lambda n: n * 10
    code = (
        "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)\nlist(pool.map(probe, [1, 2]))"
    )
    assert worker.execute(code, tools=[tool("probe", "n")]).value == [10, 20]
    result = worker.execute("list(pool.map(lambda n: (print(n), probe(n))[1], [3]))")
    assert (result.value, result.output) == ([30], "3\n")


def test_to_thread_works_in_execution_after_execution(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["probe"] = lambda: "called"
    code = "import asyncio\nawait asyncio.gather(*[asyncio.to_thread(probe) for _ in range(20)])"
    for _ in range(3):
        assert worker.execute(code, tools=[tool("probe")]).value == ["called"] * 20


def test_thread_that_waits_for_a_tool_is_let_go_when_its_execution_ends(
    worker: WorkerProcess, plane: GuestPlane
) -> None:
    hold = threading.Event()
    plane.answers["slow"] = lambda r: (hold.wait(), {"call_id": "c", "state": "done", "value": 1, "error": None})[1]
    code = """
import threading
seen = []
def ask():
    try:
        seen.append(slow())
    except RuntimeError as error:
        seen.append(str(error))
t = threading.Thread(target=ask); t.start()
begun()
"""
    plane.tools["begun"] = lambda: plane.arrived.acquire() and plane.arrived.acquire()  # its own arrival, and slow()'s
    running = worker.begin(code, tools=[tool("slow"), tool("begun")])
    assert running.result().outcome == "ok"
    result = worker.execute("t.join(); seen[0]")
    hold.set()
    assert "slow() was given up: its execution has ended" in result.value or "has ended" in result.value


def test_task_left_pending_goes_on_when_a_later_execution_awaits_it(worker: WorkerProcess) -> None:
    worker.execute(
        "import asyncio\n"
        "go = asyncio.Event()\n"
        "async def f():\n"
        "    await go.wait()\n"
        "    return 'finished'\n"
        "task = asyncio.create_task(f()); await asyncio.sleep(0)"
    )
    assert worker.execute("go.set()\nawait task").value == "finished"


def test_top_level_await_and_asyncio_run_both_work_again_and_again(worker: WorkerProcess) -> None:
    worker.execute("import asyncio\nasync def f(n):\n    await asyncio.sleep(0)\n    return n")
    for n in range(3):
        assert worker.execute(f"await f({n})").value == n
        assert worker.execute(f"asyncio.run(f({n}))").value == n
        assert worker.execute(f"asyncio.get_event_loop_policy().new_event_loop().run_until_complete(f({n}))").value == n


def test_async_statements_at_top_level_work(worker: WorkerProcess) -> None:
    code = """
import asyncio, contextlib, contextvars
name = contextvars.ContextVar('name', default='unset')
@contextlib.asynccontextmanager
async def opened():
    yield 3
async def numbers():
    for i in range(3): yield i
name.set('set')
async with opened() as n:
    total = n
async for i in numbers():
    total += i
total, [i async for i in numbers()], name.get()
"""
    assert worker.execute(code).value == [6, [0, 1, 2], "set"]


def test_async_last_expression_that_is_not_awaited_is_just_shown(worker: WorkerProcess) -> None:
    result = worker.execute("async def f(): return 1\nx = await f()\nc = f()\nc.close()\nprint(x)")
    assert (result.outcome, result.value, result.output) == ("ok", None, "1\n")


def test_error_in_an_await_shows_its_lines(worker: WorkerProcess) -> None:
    result = worker.execute("async def f():\n    1/0\nx = 1\nawait f()")
    assert result.error is not None
    assert result.error["lineno"] == 2
    assert "await f()" in result.error["traceback"]
    assert "broker" not in result.error["traceback"]
