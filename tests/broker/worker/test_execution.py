"""What an execution returns, and what stays in the namespace."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from broker.protocol import limits
from broker.protocol.messages import ExecutionResult
from tests.broker.worker.harness import WorkerProcess


def test_worker_announces_itself_once_with_its_pid(worker: WorkerProcess) -> None:
    assert worker.ready["type"] == "ready"
    assert worker.ready["pid"] == worker.process.pid


def test_worker_returns_when_the_channel_closes(worker: WorkerProcess) -> None:
    worker.execute("x = 1")
    assert worker.close() == 0


def test_result_frame_reads_as_an_execution_result(worker: WorkerProcess) -> None:
    running = worker.begin("1/0")
    header, _ = worker.receive()
    os.close(running._pipe)
    result = ExecutionResult.from_json(header)
    assert result.error is not None
    assert (result.outcome.value, result.error.type) == ("raised", "ZeroDivisionError")


@pytest.mark.parametrize(
    ("code", "value", "display"),
    [
        ("1+1", 2, "2"),
        ("'text'", "text", "text"),
        ("x = 5\nx", 5, "5"),
        ("x = 5", None, None),
        ("None", None, None),
        ("False", False, "False"),
        ("0", 0, "0"),
        ("{'a': [1, (2, 3)]}", {"a": [1, [2, 3]]}, "{'a': [1, (2, 3)]}"),
        ("1; 2", 2, "2"),
        ("if True:\n    7", None, None),
        ("{1: 2}", {1: 2}, "{1: 2}"),
        ("{3}", "{3}", "{3}"),
        ("object", "<class 'object'>", "<class 'object'>"),
        ("import collections; collections.Counter('aa')", "Counter({'a': 2})", "Counter({'a': 2})"),
        ("float('inf')", float("inf"), "inf"),
        ("10**30", 10**30, str(10**30)),
    ],
)
def test_last_expression_is_the_value(worker: WorkerProcess, code: str, value: Any, display: str | None) -> None:
    result = worker.execute(code)
    assert (result.outcome, result.value, result.display) == ("ok", value, display)


@pytest.mark.parametrize("code", ["", "   \n\n", "# only a comment", "pass", "'''docstring'''\npass"])
def test_code_without_a_last_expression_has_no_value(worker: WorkerProcess, code: str) -> None:
    result = worker.execute(code)
    assert (result.outcome, result.value, result.display, result.error) == ("ok", None, None, None)


def test_namespace_persists_and_is_that_of_main(worker: WorkerProcess) -> None:
    worker.execute("import pickle\nclass Point:\n    x = 3\ndef double(n): return 2 * n")
    assert worker.execute("__name__").value == "__main__"
    assert worker.execute("import sys; sys.modules['__main__'].__dict__ is globals()").value is True
    assert worker.execute("pickle.loads(pickle.dumps(double))(4)").value == 8
    assert worker.execute("pickle.loads(pickle.dumps(Point())).x").value == 3


def test_namespace_holds_nothing_of_the_workers(worker: WorkerProcess) -> None:
    names = worker.execute("sorted(globals())").value
    assert names == ["SUBMIT", "__builtins__", "__doc__", "__loader__", "__name__", "__package__", "__spec__"]


def test_dataclasses_and_multiprocessing_work(worker: WorkerProcess) -> None:
    code = """
import dataclasses, multiprocessing
@dataclasses.dataclass
class Job:
    n: int
def work(job): return job.n * 10
with multiprocessing.get_context("fork").Pool(2) as pool:
    results = pool.map(work, [Job(1), Job(2)])
results
"""
    assert worker.execute(code).value == [10, 20]


def test_failing_repr_does_not_break_the_result(worker: WorkerProcess) -> None:
    code = "class Bad:\n    def __repr__(self): raise ValueError('broken')\nBad()"
    result = worker.execute(code)
    assert result.outcome == "ok"
    assert result.display == "<Bad object; its repr() failed: ValueError: broken>"


def test_integer_too_long_to_print_does_not_break_the_result(worker: WorkerProcess) -> None:
    result = worker.execute("10**5000")
    assert result.outcome == "ok"
    assert result.display is not None


def test_display_is_bounded_and_says_so(worker: WorkerProcess) -> None:
    result = worker.execute("'ab' * 1_000_000")
    assert result.value == "ab" * 1_000_000
    assert result.display is not None
    assert len(result.display) < limits.MAX_DISPLAY_CHARS + 200
    assert "left out" in result.display
    assert len(worker.execute("list(range(3_000_000))").display or "") < limits.MAX_DISPLAY_CHARS + 200


def test_value_that_contains_itself_is_shown_as_text(worker: WorkerProcess) -> None:
    result = worker.execute("x = [1]; x.append(x); x")
    assert (result.outcome, result.value) == ("ok", "[1, [...]]")


def test_variables_are_injected_before_the_code_runs(worker: WorkerProcess) -> None:
    result = worker.execute("len(doc), bag, n", {"doc": "é" * 100_000, "bag": {"k": (1, 2)}, "n": float("nan")})
    assert result.outcome == "ok"
    assert result.value[:2] == [100_000, {"k": [1, 2]}]


def test_variable_sent_again_resets_what_the_code_did_to_the_name(worker: WorkerProcess) -> None:
    worker.execute("n = 99; items.append(1)", {"n": 1, "items": []})
    assert worker.execute("n, items", {"n": 1, "items": []}).value == [1, []]


def test_kept_value_is_referred_to_without_being_sent_again(worker: WorkerProcess) -> None:
    text = "t" * 100_000
    header = {"type": "execute", "execution_id": "k1", "code": "first = doc; len(doc)", "drop": []}
    sent = worker.begin_raw({**header, "variables": {"doc": {"$blob": [0, "str", "id-1"]}}}, [text.encode()]).result()
    assert sent.value == 100_000
    again = {**header, "execution_id": "k2", "variables": {"doc": {"$ref": "id-1"}}, "code": "doc is first"}
    assert worker.begin_raw(again, []).result().value is True
    dropped = {**again, "execution_id": "k3", "drop": ["id-1"]}
    result = worker.begin_raw(dropped, []).result()
    assert result.outcome == "raised"
    assert "variable 'doc'" in result.message
    assert "id-1" in result.message


def test_variable_that_cannot_be_decoded_is_named_and_nothing_runs(worker: WorkerProcess) -> None:
    header = {"type": "execute", "execution_id": "b1", "code": "ran = True", "drop": []}
    result = worker.begin_raw({**header, "variables": {"good": 1, "bad": {"$nonsense": 1}}}, []).result()
    assert result.outcome == "raised"
    assert result.message.startswith("variable 'bad' could not be set")
    assert worker.execute("'ran' in globals(), 'good' in globals()").value == [False, False]


def test_large_variable_and_large_value_pass_through(worker: WorkerProcess) -> None:
    text = "0123456789" * 500_000
    assert worker.execute("data[::-1]", {"data": text}).value == text[::-1]


def test_binary_value_is_text_since_json_has_no_bytes(worker: WorkerProcess) -> None:
    assert worker.execute("b'\\x00'").value == "b'\\x00'"


def test_code_that_deletes_its_builtins_has_them_again(worker: WorkerProcess) -> None:
    worker.execute("__builtins__ = {}; del SUBMIT; __name__ = 'other'")
    assert worker.execute("len('abc'), SUBMIT.__name__, __name__").value == [3, "SUBMIT", "__main__"]


def test_tiny_recursion_limit_does_not_end_the_session(worker: WorkerProcess) -> None:
    worker.execute("import sys; sys.setrecursionlimit(60)")
    assert worker.execute("sys.getrecursionlimit()").value >= 250


def test_trace_function_left_behind_does_not_reach_the_worker(worker: WorkerProcess) -> None:
    worker.execute(
        "import sys\nhooks = sys.gettrace(), sys.getprofile()\n"
        "def t(*a): raise ValueError('traced')\n"
        "sys.settrace(t); sys.setprofile(lambda *a: None)"
    )
    assert worker.execute("(sys.gettrace(), sys.getprofile()) == hooks").value is True


def test_memory_error_is_survived(worker: WorkerProcess) -> None:
    worker.execute("kept = 1")
    result = worker.execute("[0] * 10**15")
    assert (result.outcome, result.error and result.error["type"]) == ("raised", "MemoryError")
    assert worker.execute("kept").value == 1


def test_forked_child_that_runs_off_the_end_is_no_second_worker(worker: WorkerProcess) -> None:
    result = worker.execute(
        "import os\npid = os.fork()\nif pid == 0: print('child')\nelse: os.waitpid(pid, 0); print('parent')"
    )
    assert result.outcome == "ok"
    assert sorted(result.output.split()) == ["child", "parent"]
    assert worker.execute("1").value == 1


def test_forked_child_that_raises_ends_with_a_traceback_and_status_1(worker: WorkerProcess) -> None:
    code = "import os\npid = os.fork()\nif pid == 0: 1/0\nos.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
    result = worker.execute(code)
    assert result.value == 1
    assert "ZeroDivisionError" in result.output


def test_child_left_behind_does_not_hold_the_channel_open(worker: WorkerProcess) -> None:
    code = "import os, signal\npid = os.fork()\nif pid == 0:\n    signal.pause()\npid"
    running = worker.begin(code)
    child = worker.receive()[0]["value"]
    try:
        worker.process.kill()
        worker.process.wait()
        assert worker.sock.recv(1) == b""  # the end of the channel, although the child lives
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(running._pipe)


def test_modules_in_the_working_directory_can_be_imported(worker: WorkerProcess) -> None:
    code = (
        "import os, tempfile\n"
        "os.chdir(tempfile.mkdtemp())\n"
        "open('mine.py', 'w').write('answer = 42')\n"
        "import mine\n"
        "mine.answer"
    )
    assert worker.execute(code).value == 42


def test_writing_to_a_pipe_without_reader_is_an_error_not_the_end(worker: WorkerProcess) -> None:
    result = worker.execute("import os\nr, w = os.pipe(); os.close(r)\nos.write(w, b'x')")
    assert result.error is not None
    assert result.error["type"] == "BrokenPipeError"
