"""SUBMIT: its signature and checks, and that it ends the execution whatever surrounds it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from broker.protocol import limits
from tests.broker.worker.harness import Result, WorkerProcess
from tests.broker.worker.stubborn import STUBBORN

FIELDS = [{"name": "answer", "type": "str"}, {"name": "score", "type": "float"}]
has_numpy = pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="numpy is not installed here")


def submitted(result: Result) -> Any:
    assert result.outcome == "submitted", result
    assert result.error is None
    return result.value


def type_error(result: Result) -> str:
    assert result.outcome == "raised", result
    assert result.error is not None
    assert result.error["type"] == "TypeError"
    return result.message


@pytest.mark.parametrize(
    "call",
    ["SUBMIT('a', 0.5)", "SUBMIT(answer='a', score=0.5)", "SUBMIT('a', score=0.5)", "SUBMIT(score=0.5, answer='a')"],
)
def test_fields_go_by_position_and_by_name(worker: WorkerProcess, call: str) -> None:
    assert submitted(worker.execute(call, output_fields=FIELDS)) == {"answer": "a", "score": 0.5}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("SUBMIT()", "missing 2 required positional arguments: 'answer' and 'score'"),
        ("SUBMIT('a')", "missing 1 required positional argument: 'score'"),
        ("SUBMIT('a', 1, 2)", "takes 2 positional arguments but 3 were given"),
        ("SUBMIT('a', 1, extra=2)", "unexpected keyword argument 'extra'"),
        ("SUBMIT('a', answer='b')", "multiple values for argument 'answer'"),
    ],
)
def test_wrong_counts_and_names_are_errors_to_retry(worker: WorkerProcess, call: str, says: str) -> None:
    message = type_error(worker.execute(call, output_fields=FIELDS))
    assert message.startswith("SUBMIT() ")
    assert says in message
    assert message.endswith("expected SUBMIT(answer: str, score: float)")
    assert submitted(worker.execute("SUBMIT('a', 1)")) == {"answer": "a", "score": 1}


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("str", ["'x'", "5", "1.5", "True"], ["[1]", "{}", "None", "b'x'", "{1}", "('a', 'b')"]),
        ("int", ["5", "5.0", "'7'", "-1"], ["True", "[1]", "5.5", "'five'", "None", "{}"]),
        ("float", ["5", "1.5", "'1e3'", "float('nan')", "__import__('decimal').Decimal(1)"], ["True", "'x'", "[]"]),
        ("bool", ["True", "0", "'false'"], ["2", "'maybe'", "[]", "None"]),
        ("list", ["[1]", "(1, 2)", "{1}", "frozenset()", "'[1]'"], ["'text'", "{'a': 1}", "5", "None"]),
        ("dict", ["{}", "{1: 2}", "__import__('collections').Counter('aa')", "'{}'"], ["[1]", "'text'", "5"]),
        ("NoneType", ["None"], ["0", "''"]),
        ("Unheard", ["None", "5", "[]", "{}"], []),
    ],
)
def test_types_are_checked_only_where_they_are_surely_wrong(
    worker: WorkerProcess, kind: str, good: list[str], bad: list[str]
) -> None:
    fields = [{"name": "field", "type": kind}]
    for text in good:
        assert submitted(worker.execute(f"SUBMIT({text})", output_fields=fields)).keys() == {"field"}, text
    for text in bad:
        message = type_error(worker.execute(f"SUBMIT({text})", output_fields=fields))
        assert message.startswith(f"SUBMIT() field 'field' must be {kind}, got "), text


@has_numpy
def test_numpy_values_fit_the_types_they_stand_for(worker: WorkerProcess) -> None:
    fields = [{"name": n, "type": n} for n in ("int", "float", "bool", "list")]
    code = "import numpy as np\nSUBMIT(np.int64(3), np.float32(0.5), np.bool_(True), np.arange(3))"
    value = submitted(
        worker.execute(code.replace("int64", "int32"), output_fields=[{**f, "name": f"f_{f['name']}"} for f in fields])
    )
    assert value == {"f_int": 3, "f_float": 0.5, "f_bool": True, "f_list": [0, 1, 2]}


def test_without_output_fields_one_value_or_any_keywords_go(worker: WorkerProcess) -> None:
    assert submitted(worker.execute("SUBMIT([1, (2,)])")) == {"output": [1, [2]]}
    assert submitted(worker.execute("SUBMIT(a=1, self=2)")) == {"a": 1, "self": 2}
    assert "one value or only keywords" in type_error(worker.execute("SUBMIT()"))
    assert "one value or only keywords" in type_error(worker.execute("SUBMIT(1, 2)"))


def test_fields_stay_until_they_are_sent_again_and_an_empty_list_means_any(worker: WorkerProcess) -> None:
    worker.execute("1", output_fields=FIELDS)
    type_error(worker.execute("SUBMIT(1)"))
    assert submitted(worker.execute("SUBMIT(1)", output_fields=[])) == {"output": 1}


def test_field_names_may_be_anything(worker: WorkerProcess) -> None:
    fields = [{"name": name} for name in ("self", "args", "kwargs", "submit", "__debug__")]
    assert submitted(worker.execute("SUBMIT(1, 2, 3, 4, 5)", output_fields=fields))["kwargs"] == 3


def test_signature_and_help_show_the_fields(worker: WorkerProcess) -> None:
    code = "import inspect\nhelp(SUBMIT)\nstr(inspect.signature(SUBMIT))"
    result = worker.execute(code, output_fields=FIELDS)
    assert result.value == "(answer: str, score: float)"
    assert "SUBMIT(answer: str, score: float)" in result.output
    assert worker.execute("inspect.isfunction(SUBMIT)").value is True


def test_value_that_cannot_be_sent_is_named_by_its_path_and_can_be_corrected(worker: WorkerProcess) -> None:
    code = (
        "try:\n    SUBMIT({'rows': [1, object()]}, 1)\nexcept TypeError as e:\n    print(e)\n    SUBMIT('corrected', 2)"
    )
    result = worker.execute(code, output_fields=[{"name": "answer"}, {"name": "score"}])
    assert "SUBMIT() field 'answer'['rows'][1]: a value of type builtins.object" in result.output
    assert submitted(result) == {"answer": "corrected", "score": 2}


def test_value_whose_own_methods_fail_is_a_type_error(worker: WorkerProcess) -> None:
    code = "class Evil:\n    def model_dump(self): raise ValueError('no dump')\nSUBMIT(Evil())"
    assert "ValueError: no dump" in type_error(worker.execute(code))


def test_value_too_large_for_a_frame_is_a_type_error_and_the_session_lives(worker: WorkerProcess) -> None:
    message = type_error(worker.execute(f"SUBMIT('x' * {limits.MAX_TOOL_CALL_BYTES + 1})"))
    assert f"at most {limits.MAX_TOOL_CALL_BYTES:,} can be sent" in message
    assert submitted(worker.execute("SUBMIT(1)")) == {"output": 1}


def test_large_values_travel_as_blobs(worker: WorkerProcess) -> None:
    assert submitted(worker.execute("SUBMIT('x' * 1_000_000)")) == {"output": "x" * 1_000_000}


def test_changing_the_value_afterwards_changes_nothing(worker: WorkerProcess) -> None:
    code = (
        "rows = [1]\n"
        "class C:\n"
        "    def __exit__(self, *a): rows.append(2)\n"
        "    def __enter__(self): pass\n"
        "with C():\n"
        "    SUBMIT(rows)"
    )
    assert submitted(worker.execute(code)) == {"output": [1]}


@pytest.mark.parametrize("code", STUBBORN.values(), ids=list(STUBBORN))
def test_submit_ends_the_execution_at_once_inside_anything(worker: WorkerProcess, code: str) -> None:
    worker.execute(
        "import sys\nkept, hooks = 5, (sys.gettrace(), sys.getprofile())\n"
        "def keep_trying(f):\n"
        "    while True:\n"
        "        try:\n"
        "            return f()\n"
        "        except BaseException:\n"
        "            print('LATE')"
    )
    result = worker.execute("print('before')\n" + code)
    assert submitted(result) == {"output": 1 if "range(3)" not in code else 0}
    assert result.output == "before\n"
    after = worker.execute("print('after')\n(kept, (sys.gettrace(), sys.getprofile()) == hooks)")
    assert (after.value, after.output) == ([5, True], "after\n")


@pytest.mark.parametrize(
    "code",
    [
        "import threading\nlock = threading.Lock()\nwith lock:\n    SUBMIT(1)",
        (
            "import threading\n"
            "lock = threading.Lock()\n"
            "try:\n"
            "    with lock:\n"
            "        SUBMIT(1)\n"
            "except BaseException:\n"
            "    pass"
        ),
        (
            "import asyncio, threading\n"
            "lock = threading.Lock()\n"
            "async def f():\n"
            "    with lock:\n"
            "        SUBMIT(1)\n"
            "asyncio.run(f())"
        ),
    ],
)
def test_locks_of_with_blocks_are_released(worker: WorkerProcess, code: str) -> None:
    submitted(worker.execute(code))
    assert worker.execute("lock.acquire(timeout=0)").value is True


def test_event_loops_work_after_a_submit_inside_one(worker: WorkerProcess) -> None:
    submitted(worker.execute("import asyncio\nasync def f(): SUBMIT(1)\nasyncio.run(f())"))
    submitted(worker.execute("await f()"))
    assert worker.execute("async def g(): return 7\nasyncio.run(g())").value == 7
    assert worker.execute("await g()").value == 7


def test_first_submit_wins(worker: WorkerProcess) -> None:
    code = "try:\n    SUBMIT('first')\nexcept BaseException:\n    SUBMIT('second')"
    assert submitted(worker.execute(code)) == {"output": "first"}


def test_library_that_waits_for_a_busy_thread_does_not_hold_up_the_submit(worker: WorkerProcess) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
import threading
never = threading.Event()
with ThreadPoolExecutor() as pool:
    pool.submit(never.wait)
    SUBMIT('done')
"""
    assert submitted(worker.execute(code)) == {"output": "done"}
    assert worker.execute("never.set(); 1").value == 1


def test_submit_in_a_forked_child_is_refused(worker: WorkerProcess) -> None:
    code = "import os\npid = os.fork()\nif pid == 0:\n    SUBMIT(1)\nos.waitpid(pid, 0)[1] >> 8"
    result = worker.execute(code)
    assert result.value == 1
    assert "SUBMIT works in the session's own process" in result.output


def test_submit_of_a_stale_thread_is_refused(worker: WorkerProcess) -> None:
    worker.execute(
        "import threading\ngo, seen = threading.Event(), []\n"
        "def late():\n"
        "    go.wait()\n"
        "    try:\n"
        "        SUBMIT('late')\n"
        "    except RuntimeError as e:\n"
        "        seen.append(str(e))\n"
        "t = threading.Thread(target=late)\nt.start()"
    )
    result = worker.execute("go.set(); t.join(); seen[0]")
    assert result.outcome == "ok"
    assert "belongs to an execution that has ended" in result.value


def test_end_of_output_is_seen_at_the_submit(worker: WorkerProcess) -> None:
    code = "import os\ntry:\n    SUBMIT(1)\nfinally:\n    os.write(1, b'LATE')"
    running = worker.begin(code)
    assert running.result().output == ""
    assert os.path.exists(f"/proc/{worker.process.pid}")
