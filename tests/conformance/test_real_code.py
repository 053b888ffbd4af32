"""Claims about code that really runs, under every DSPy version."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
from dspy.primitives import code_interpreter
from dspy.primitives.code_interpreter import CodeInterpreterError

from host_client import SandboxSettings
from host_client.errors import SessionLost
from tests.conformance.backends import Backend

CODE_ERROR: type[Exception] = getattr(code_interpreter, "CodeExecutionError", CodeInterpreterError)


def test_help_shows_the_real_signature_and_docstring(real_backend: Backend) -> None:
    def search(query: str, limit: int = 10) -> list[str]:
        """Search the index."""
        return [query] * limit

    text = real_backend.make(tools={"search": search}).execute("help(search)")
    assert "search(query: str, limit: int = 10) -> list[str]" in text
    assert "Search the index." in text


def test_a_thousand_calls_at_once(real_backend: Backend) -> None:
    count = 0
    lock = threading.Lock()

    def note(index: int) -> int:
        nonlocal count
        with lock:
            count += 1
        return index

    interpreter = real_backend.make(tools={"note": note})
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(1000) as pool:\n"
        "    results = list(pool.map(note, range(1000)))\n"
        "results == list(range(1000))"
    )
    assert interpreter.execute(code) is True
    assert count == 1000


@pytest.mark.parametrize("slots", [1, 4])
def test_few_slots_are_enough_for_many_calls(real_backend: Backend, slots: int) -> None:
    interpreter = real_backend.make(tools={"same": lambda x: x}, settings=SandboxSettings(max_concurrent_tools=slots))
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(50) as pool:\n"
        "    results = list(pool.map(same, range(200)))\n"
        "[results == list(range(200)), same('after')]"
    )
    assert interpreter.execute(code) == [True, "after"]


def test_a_large_variable_is_sent_once_and_stays_what_it_was(real_backend: Backend) -> None:
    interpreter = real_backend.make()
    context = "ä" * (1 << 20)
    assert interpreter.execute("n = len(context); context = None; n", {"context": context}) == 1 << 20
    assert interpreter.execute("context == 'ä' * (1 << 20)", {"context": context}) is True
    assert interpreter.execute("context[:1]", {"context": "b" + context}) == "b"


def test_an_unfinished_tool_does_not_hold_the_deadline(real_backend: Backend) -> None:
    release = threading.Event()
    interpreter = real_backend.make(tools={"hang": lambda: release.wait(30)}, execution_timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(CODE_ERROR):
        interpreter.execute("x = 1\nhang()")
    assert time.monotonic() - began < 3
    assert interpreter.execute("x") == 1
    release.set()


def test_time_in_tools_can_be_left_out_of_the_deadline(real_backend: Backend) -> None:
    settings = SandboxSettings(timeout_includes_tools=False)
    interpreter = real_backend.make(
        tools={"slow": lambda: time.sleep(0.6) or "done"}, execution_timeout_s=0.3, settings=settings
    )
    assert interpreter.execute("slow()") == "done"


def test_code_that_ignores_the_deadline_is_killed_and_a_new_interpreter_works(real_backend: Backend) -> None:
    interpreter = real_backend.make(execution_timeout_s=0.3)
    code = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\nwhile True: pass"
    began = time.monotonic()
    with pytest.raises(SessionLost) as caught:
        interpreter.execute(code)
    assert caught.value.reason == "deadline"
    assert time.monotonic() - began < 5
    assert real_backend.make().execute("1") == 1


def test_ctrl_c_keeps_the_session(real_backend: Backend) -> None:
    interpreter = real_backend.make(tools={"press": lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        interpreter.execute("x = 1\npress()\nwhile True: pass")
    assert interpreter.execute("x") == 1


def test_a_tool_that_exits_stops_the_caller_and_keeps_the_session(real_backend: Backend) -> None:
    def leave() -> None:
        raise SystemExit(3)

    interpreter = real_backend.make(tools={"leave": leave})
    with pytest.raises(SystemExit):
        interpreter.execute("x = 1\ntry:\n    leave()\nexcept Exception:\n    pass\nwhile True: pass")
    assert interpreter.execute("x") == 1


def test_shutdown_from_another_thread(real_backend: Backend) -> None:
    interpreter = real_backend.make(tools={"stop": lambda: threading.Thread(target=interpreter.shutdown).start()})
    with pytest.raises(SessionLost) as caught:
        interpreter.execute("stop()\nwhile True: pass")
    assert caught.value.reason == "shutdown"


def test_output_beyond_the_limit_is_noted(real_backend: Backend) -> None:
    interpreter = real_backend.make(settings=SandboxSettings(max_output_bytes=1024))
    text = interpreter.execute("print('x' * 10_000)")
    assert len(text) < 1200
    assert "more bytes were printed" in text


def test_arrays_and_tables_go_in_and_come_back_as_plain_values(real_backend: Backend) -> None:
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    interpreter = real_backend.make(tools={"give": lambda: numpy.arange(3)})
    assert interpreter.execute("[type(a).__name__, int(a.sum())]", {"a": numpy.arange(4)}) == ["ndarray", 6]
    assert interpreter.execute("table.shape", {"table": pandas.DataFrame({"x": [1, 2]})}) == [2, 1]
    assert interpreter.execute("int(give().sum())") == 3


def test_several_interpreters_do_not_see_each_other(real_backend: Backend) -> None:
    one, two = real_backend.make(), real_backend.make()
    one.execute("x = 1")
    with pytest.raises(CODE_ERROR, match="NameError"):
        two.execute("x")


@pytest.mark.parametrize("variables", [{"v": float}, {"v": [object()]}])
def test_nothing_runs_when_a_variable_cannot_be_sent(real_backend: Backend, variables: dict[str, Any]) -> None:
    interpreter = real_backend.make()
    with pytest.raises(ValueError, match="variable v"):
        interpreter.execute("x = 1", variables)
    with pytest.raises(CODE_ERROR, match="NameError"):
        interpreter.execute("x")
