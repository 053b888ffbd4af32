"""Claims about the output pipe, which a session keeps while nobody but its worker can print into it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from broker.testing import InProcessBroker

PIPE = "import os; os.fstat(1).st_ino"
Run = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def box() -> Iterator[InProcessBroker]:
    with InProcessBroker() as running:
        yield running


@pytest.fixture
def run(box: InProcessBroker) -> Iterator[Run]:
    _, opened, _ = box.host.request("POST", "/v1/sessions", {})
    numbers = itertools.count(1)
    path = f"/v1/sessions/{opened['session_id']}/executions?wait_s=20"

    def execute(code: str) -> dict[str, Any]:
        body = {"execution_id": f"e{next(numbers)}", "code": code}
        result: dict[str, Any] = box.host.request("POST", path, body)[1]["result"]
        return result

    yield execute
    box.host.request("DELETE", f"/v1/sessions/{opened['session_id']}")


def test_code_that_only_prints_uses_one_pipe(run: Run) -> None:
    first = run(PIPE)["value"]
    for text in ("one", "two", ""):
        assert run(f"print({text!r}, end='')")["output"] == text
    assert run(PIPE)["value"] == first


def test_each_output_is_its_own_executions(run: Run) -> None:
    outputs = [run(f"print({number}); import sys; print('e', file=sys.stderr)")["output"] for number in range(20)]
    assert outputs == [f"{number}\ne\n" for number in range(20)]


@pytest.mark.parametrize(
    "start",
    [
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; pid = os.fork() or os._exit(0); os.waitpid(pid, 0)",
        "import os; os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
        "import ctypes; ctypes.CDLL(None)",
        "import threading; stop = threading.Event(); threading.Thread(target=stop.wait).start()",
        "import os; os.dup2(os.open('/dev/null', os.O_WRONLY), 2)",
        "import os; os.close(1)",
        "SUBMIT(1)",
    ],
    ids=["subprocess", "system", "fork", "posix_spawn", "ctypes", "thread", "redirected", "closed", "submitted"],
)
def test_where_somebody_else_may_hold_it_the_next_execution_gets_a_new_one(run: Run, start: str) -> None:
    first = run(PIPE)["value"]
    run(start)
    assert run(PIPE)["value"] != first
    assert run("print('heard')")["output"] == "heard\n"
    run("globals().get('stop') and stop.set()")


def test_what_a_left_over_process_prints_reaches_no_later_execution(run: Run) -> None:
    run(
        "import subprocess; child = subprocess.Popen(['sh', '-c', 'read line; echo late; sleep 0.01; echo later'], "
        "stdin=subprocess.PIPE)"
    )
    assert run("print('clean')")["output"] == "clean\n"
    result = run("child.stdin.write(b'go\\n'); child.stdin.close(); status = child.wait(); print(status)")
    assert result["output"].splitlines()[-1] in ("0", "141", "-13")
    assert "late" not in result["output"]


def test_a_printing_flood_ends_as_before_and_the_session_goes_on(run: Run) -> None:
    run("1")
    result = run("x = 'y' * 1000\nwhile True: print(x)")
    assert result["outcome"] == "output_limit"
    assert run("print('after')")["output"] == "after\n"


def test_what_is_printed_between_executions_is_thrown_away(run: Run) -> None:
    run("import signal\nsignal.signal(signal.SIGALRM, lambda *_: print('between'))\nsignal.setitimer(0, 0.02)\n1")
    give_up_at = time.monotonic() + 10
    while time.monotonic() < give_up_at:
        result = run("signal.getitimer(0)[0]")
        if not result["value"]:
            break
    assert run("'done'")["output"] == ""
