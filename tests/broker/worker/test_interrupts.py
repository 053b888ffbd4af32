"""SIGINT ends what runs, keeps the namespace, and is ignored between executions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.broker.worker.harness import ROOT, GuestPlane, WorkerProcess, tool

BUSY = {
    "python loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "event": "import threading; threading.Event().wait()",
    "join": "import threading\nt = threading.Thread(target=threading.Event().wait, daemon=True); t.start(); t.join()",
    "await": "import asyncio; await asyncio.Event().wait()",
    "asyncio.run": "import asyncio\nasync def f(): await asyncio.Event().wait()\nasyncio.run(f())",
    "busy task": (
        "import asyncio\nasync def f():\n    while True: await asyncio.sleep(0)\nawait asyncio.gather(f(), f())"
    ),
    "subprocess": (
        "import subprocess\nchild = subprocess.Popen(['sleep', '1000'])\n"
        "try:\n    print('started')\n    child.wait()\nfinally:\n    child.kill()"
    ),
    "pool": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "import threading\n"
        "e = threading.Event()\n"
        "ThreadPoolExecutor().submit(e.wait).result()"
    ),
    "repr of the result": "class R:\n    def __repr__(self):\n        while True: pass\nR()",
    "str of the error": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    "read of a pipe": "import os; os.read(os.pipe()[0], 1)",
}


@pytest.mark.parametrize("code", BUSY.values(), ids=list(BUSY))
def test_interrupt_ends_the_execution_and_keeps_the_namespace(worker: WorkerProcess, code: str) -> None:
    worker.execute("kept = 5")
    running = worker.begin(code if "started" in code else "print('started')\n" + code)
    running.wait_for("started")
    worker.interrupt()
    result = running.result()
    assert result.outcome == "interrupted", result
    assert result.error is not None
    assert "broker" not in result.error["traceback"]
    assert worker.execute("kept").value == 5
    assert worker.execute("import asyncio; await asyncio.sleep(0); 6").value == 6


def test_interrupt_tells_the_line(worker: WorkerProcess) -> None:
    running = worker.begin("\n\nwhile True:\n    print('started')")
    running.wait_for("started")
    worker.interrupt()
    error = running.result().error
    assert error is not None
    assert error["type"] == "KeyboardInterrupt"
    assert error["lineno"] in (3, 4)


def test_interrupt_between_executions_is_ignored(worker: WorkerProcess) -> None:
    worker.execute("x = 1")
    for _ in range(5):
        worker.interrupt()
    assert worker.execute("x").value == 1


def test_interrupt_before_the_code_is_remembered_and_nothing_runs() -> None:
    script = """
import signal, sys
from broker.worker.current import Current, Execution
from broker.worker.interrupts import Interrupts, interruptible
from broker.worker.repl import Repl
current = Current()
current.execution = Execution("x1")
handler = Interrupts(current, lambda: None)
handler.restore()
signal.raise_signal(signal.SIGINT)  # in the worker's own code: must not raise
print(current.execution.interrupts, Repl().run(current.execution, "print('ran')", {}, []).outcome.value)
current.execution = Execution("x2")
try:
    interruptible(signal.raise_signal, signal.SIGINT)  # C code called by that frame: not below it either
    interruptible(lambda: signal.raise_signal(signal.SIGINT))
except KeyboardInterrupt:
    print(current.execution.interrupts, "raised")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "1 interrupted\n2 raised\n"


def test_interrupt_that_comes_with_the_code_is_not_lost(worker: WorkerProcess) -> None:
    for _ in range(100):
        running = worker.begin("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass")
        assert running.result().outcome == "interrupted"


def test_interrupt_breaks_a_wrapper_that_waits(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.answers["slow"] = lambda request: {"call_id": "c1", "state": "started", "value": None, "error": None}
    hold = threading.Event()

    def held(request: dict[str, object]) -> dict[str, object]:
        plane.arrived.release()
        hold.wait()
        return {"call_id": "c1", "state": "cancelled", "value": None, "error": None}

    plane.later["c1"] = held
    running = worker.begin("slow()", tools=[tool("slow")])
    plane.arrived.acquire()
    plane.arrived.acquire()
    worker.interrupt()
    assert running.result().outcome == "interrupted"
    hold.set()
    plane.tools["fast"] = lambda: "answer"
    assert worker.execute("fast()", tools=[tool("fast")]).value == "answer"


def test_interrupt_lets_go_of_a_pool_whose_threads_wait_for_tools(worker: WorkerProcess, plane: GuestPlane) -> None:
    hold = threading.Event()

    def held(request: dict[str, object]) -> dict[str, object]:
        hold.wait()
        return {"call_id": "c", "state": "cancelled", "value": None, "error": None}

    plane.answers["slow"] = held
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda i: slow(), range(20)))
"""
    running = worker.begin(code, tools=[tool("slow")])
    for _ in range(4):
        plane.arrived.acquire()
    worker.interrupt()
    assert running.result().outcome == "interrupted"
    assert len(plane.requests) == 4  # those queued behind them were not started
    hold.set()


def test_second_interrupt_ends_code_that_catches_everything(worker: WorkerProcess) -> None:
    code = """
import sys
kept, hooks = 5, (sys.gettrace(), sys.getprofile())
while True:
    try:
        print('waiting')
        while True: pass
    except BaseException as error:
        print('caught', type(error).__name__)
"""
    running = worker.begin(code)
    running.wait_for("waiting")
    worker.interrupt()
    running.wait_for("caught KeyboardInterrupt")
    running.wait_for("waiting\ncaught KeyboardInterrupt\nwaiting")
    worker.interrupt()
    result = running.result()
    assert result.outcome == "interrupted"
    assert worker.execute("kept, (sys.gettrace(), sys.getprofile()) == hooks").value == [5, True]


def test_code_that_handles_the_interrupt_can_finish(worker: WorkerProcess) -> None:
    running = worker.begin(
        "try:\n    print('started')\n    while True: pass\nexcept KeyboardInterrupt:\n    pass\n'partial result'"
    )
    running.wait_for("started")
    worker.interrupt()
    result = running.result()
    assert (result.outcome, result.value) == ("ok", "partial result")


@pytest.mark.parametrize(
    "code",
    [
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)",
        "import signal; signal.signal(signal.SIGINT, lambda *a: None)",
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})",
    ],
)
def test_next_execution_can_be_interrupted_although_code_ignored_the_signal(worker: WorkerProcess, code: str) -> None:
    worker.execute(code)
    running = worker.begin("print('started')\nwhile True: pass")
    running.wait_for("started")
    worker.interrupt()
    assert running.result().outcome == "interrupted"


def test_tasks_of_an_interrupted_await_are_gone(worker: WorkerProcess) -> None:
    code = """
import asyncio
async def ticker():
    while True:
        await asyncio.sleep(0)
tasks = [asyncio.create_task(ticker()) for _ in range(3)]
print('started')
await asyncio.Event().wait()
"""
    for _ in range(100):  # wherever in the loop's code it strikes
        running = worker.begin(code)
        running.wait_for("started")
        worker.interrupt()
        assert running.result().outcome == "interrupted"
        assert worker.execute("await asyncio.sleep(0)\n[task.done() for task in tasks]").value == [True] * 3


def test_task_that_refuses_to_be_cancelled_does_not_hold_up_the_interrupt(worker: WorkerProcess) -> None:
    code = """
import asyncio
async def stubborn():
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass
task = asyncio.create_task(stubborn())
await asyncio.sleep(0)
print('started')
await asyncio.Event().wait()
"""
    running = worker.begin(code)
    running.wait_for("started")
    worker.interrupt()
    assert running.result().outcome == "interrupted"
    assert worker.execute("await asyncio.sleep(0); 3").value == 3


def test_interrupts_at_any_moment_leave_the_worker_in_order(worker: WorkerProcess) -> None:
    """Signals race with the start and the end of short executions; each must end as ok or interrupted."""
    outcomes = set()
    for i in range(300):
        running = worker.begin(f"x = {i}\nprint(x)\nx")
        os.kill(worker.process.pid, signal.SIGINT)
        result = running.result()
        outcomes.add(result.outcome)
        assert result.outcome in ("ok", "interrupted"), result
    assert worker.execute("'alive'").value == "alive"
