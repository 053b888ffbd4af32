"""Output: everything on descriptors 1 and 2, in order, of this execution only."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.broker.worker.harness import WorkerProcess


def test_stdout_and_stderr_come_in_the_order_of_the_prints(worker: WorkerProcess) -> None:
    code = """
import sys
for i in range(3):
    print("out", i, end=" ")
    print("err", i, end=" ", file=sys.stderr)
sys.stdout.write("no newline")
"""
    assert worker.execute(code).output == "out 0 err 0 out 1 err 1 out 2 err 2 no newline"


def test_output_of_subprocesses_and_raw_writes_comes_in_order(worker: WorkerProcess) -> None:
    code = (
        "import os, subprocess\n"
        "print('a')\n"
        "subprocess.run(['echo', 'b'])\n"
        "os.write(2, b'c\\n')\n"
        "print('d')\n"
        "os.system('echo e >&2')"
    )
    assert worker.execute(code).output == "a\nb\nc\nd\ne\n"


def test_line_is_written_at_once_so_that_a_crash_loses_nothing(worker: WorkerProcess) -> None:
    running = worker.begin("print('last words')\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    running.wait_for("last words\n")
    worker.process.wait()


def test_lone_surrogates_are_printed_as_escapes(worker: WorkerProcess) -> None:
    assert worker.execute("print('\\ud800é')").output == "\\ud800é\n"


def test_each_execution_has_its_own_output(worker: WorkerProcess) -> None:
    assert worker.execute("print('one', end='')").output == "one"
    assert worker.execute("print('two', end='')").output == "two"


@pytest.mark.parametrize(
    "code",
    [
        "import sys, io; sys.stdout = io.StringIO(); sys.stderr = None",
        "import sys; sys.stdout.close(); sys.stderr.close()",
        "import sys; sys.stdout.detach()",
        "import sys, io; sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='latin-1'); print('é')",
        "import sys; del sys.stdout, sys.stderr, sys.stdin",
        "import os; os.close(1); os.close(2); print('lost')",
        "import os; os.close(0); os.close(1)",
        "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('x' * 10)",
        "import sys; sys.stdin.close()",
        "import sys; sys.stdout.buffer.raw.close()",
        "import sys; sys.stdout.buffer.write(b'z' * 100); sys.stdout.write = None",
    ],
)
def test_next_execution_has_good_streams_again(worker: WorkerProcess, code: str) -> None:
    worker.execute(code)
    result = worker.execute("import sys\nprint('good'); print('err', file=sys.stderr)\nsys.stdin.read()")
    assert (result.outcome, result.output) == ("ok", "good\nerr\n"), result


def test_buffered_text_of_a_replaced_stream_is_not_lost(worker: WorkerProcess) -> None:
    code = "import sys, os\nsys.stdout = os.fdopen(os.dup(1), 'w', buffering=100_000)\nprint('mine')"
    assert worker.execute(code).output == "mine\n"


def test_what_could_not_be_written_does_not_come_out_later(worker: WorkerProcess) -> None:
    code = "import os, sys\nold = sys.stdout, sys.stderr\nos.close(1); os.close(2)\nold[0].buffer.write(b'stale')"
    worker.execute(code)
    assert worker.execute("old[0].flush(); print('fresh')").output == "fresh\n"


def test_broker_reads_the_end_of_output_although_the_worker_lives(worker: WorkerProcess) -> None:
    running = worker.begin("print('x')")
    assert running.result().output == "x\n"  # result() reads to the end
    assert worker.execute("1").value == 1


def test_leftover_process_holds_its_own_executions_pipe_only(worker: WorkerProcess) -> None:
    running = worker.begin("import subprocess\nchild = subprocess.Popen(['cat'], stdin=subprocess.PIPE)")
    header, _ = worker.receive()
    assert header["outcome"] == "ok"
    result = worker.execute(
        "print('later'); child.stdin.write(b'from the old child'); child.stdin.close(); child.wait()"
    )
    assert result.output == "later\n"
    assert os.read(running._pipe, 100) == b"from the old child"
    os.close(running._pipe)


def test_100_000_small_prints_arrive_complete(worker: WorkerProcess) -> None:
    result = worker.execute("for i in range(100_000): print(i)")
    assert result.output == "".join(f"{i}\n" for i in range(100_000))


def test_fileno_and_names_are_as_usual(worker: WorkerProcess) -> None:
    code = "import sys; out = sys.stdout\n[out.fileno(), sys.stderr.fileno(), out.encoding, out.isatty(), out.name]"
    assert worker.execute(code).value == [1, 2, "utf-8", False, "<stdout>"]


def test_input_meets_the_end_of_file(worker: WorkerProcess) -> None:
    result = worker.execute("input('name? ')")
    assert result.error is not None
    assert result.error["type"] == "EOFError"


def test_descriptor_of_the_pipe_is_not_inherited_a_second_time(worker: WorkerProcess) -> None:
    before = set(worker.execute("import os; os.listdir('/proc/self/fd')").value)
    for _ in range(20):
        worker.execute("print('x')")
    assert set(worker.execute("os.listdir('/proc/self/fd')").value) == before
    assert subprocess.run(["true"], check=True).returncode == 0
