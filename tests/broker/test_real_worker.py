"""The broker with real workers: processes, signals, pipes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.messages import Outcome, Progress
from broker.testing import InProcessBroker
from tests.broker.conftest import Client


def ended(progress: Progress) -> Any:
    assert progress.result is not None
    return progress.result


def test_names_live_from_one_execution_to_the_next(worker: Client) -> None:
    worker.run("x = 20")
    assert ended(worker.run("x + 1")).value == 21


def test_a_tool_called_by_generated_code_reaches_the_host(worker: Client) -> None:
    progress = worker.run("search('cats') * 2")
    [claim] = progress.claims
    assert worker.answer(claim.call_id, "ab") == 200
    _, reply, _ = worker.claims(execution_id=progress.execution_id, wait_s=20)
    assert reply["result"]["value"] == "abab"


def test_at_the_deadline_the_namespace_is_kept(worker: Client) -> None:
    worker.run("kept = 'alive'")
    result = ended(worker.run("while True: pass", timeout_s=0.2))
    assert (result.outcome, result.session_lost) == (Outcome.TIMED_OUT, None)
    assert ended(worker.run("kept")).value == "alive"


def test_code_that_ignores_signals_is_killed_and_named(worker: Client) -> None:
    code = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\nwhile True: pass"
    result = ended(worker.run(code, timeout_s=0.2))
    assert (result.outcome, result.session_lost) == (Outcome.TIMED_OUT, "deadline")
    assert result.duration_s < 0.2 + 2.0 + 2.0
    assert worker.post("1")[1]["error"]["reason"] == "deadline"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os._exit(3)", "exited(3)"),
        ("import os; os.kill(os.getpid(), 9)", "killed"),
        ("import os; os.kill(os.getpid(), 11)", "crashed(SIGSEGV)"),
    ],
)
def test_the_workers_death_has_a_name(worker: Client, code: str, reason: str) -> None:
    result = ended(worker.run(f"print('last words', flush=True)\n{code}"))
    assert (result.outcome, result.session_lost, result.output) == (Outcome.WORKER_DIED, reason, "last words\n")


def test_output_beyond_the_limit_is_counted_and_thrown_away(worker: Client) -> None:
    result = ended(worker.run("print('é' * 100_000, end='')", max_output_bytes=1001))
    assert result.output == "é" * 500  # the character that the limit cut is left out
    assert result.discarded_output_bytes == 200_000 - 1001


def test_output_without_end_is_stopped_and_the_namespace_is_kept(worker: Client) -> None:
    worker.run("kept = 'alive'")
    result = ended(worker.run("import os\nwhile True: os.write(1, bytes(1 << 16))"))
    assert (result.outcome, result.session_lost) == (Outcome.OUTPUT_LIMIT, None)
    assert ended(worker.run("kept")).value == "alive"


def test_a_left_over_process_can_print_without_end_and_nobody_sees_it(worker: Client) -> None:
    code = "import subprocess\nleft = subprocess.Popen(['yes', 'SPILL'])\nprint('mine')"
    assert "mine" in ended(worker.run(code)).output
    assert ended(worker.run("print('next')")).output == "next\n"
    assert ended(worker.run("left.poll() is None")).value in (True, False)
    assert worker.box.host.request("GET", "/v1/health")[0] == 200


def test_closing_a_session_ends_its_processes_and_removes_its_files(real: InProcessBroker) -> None:
    client = Client.open(real)
    code = (
        "import os, subprocess\n"
        "p = subprocess.Popen(['sleep', '1000'])\n"
        "open('file', 'w').close()\n"
        "(p.pid, os.getcwd())"
    )
    pid, home = ended(client.run(code)).value
    assert (Path(home) / "file").exists()
    assert client.close() == 200
    assert not Path(home).exists()
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


def test_sessions_do_not_see_each_other(real: InProcessBroker) -> None:
    first, second = Client.open(real), Client.open(real)
    first.run("secret = 1")
    assert ended(second.run("secret")).outcome is Outcome.RAISED
    homes = {ended(client.run("import os; os.getcwd()")).value for client in (first, second)}
    assert len(homes) == 2
    first.close()
    assert ended(second.run("1 + 1")).value == 2
    second.close()


def test_the_worker_inherits_no_descriptor_and_no_environment(worker: Client) -> None:
    code = (
        "import os\n"
        "fds = [f'/proc/self/fd/{fd}' for fd in os.listdir('/proc/self/fd')]\n"
        "[os.readlink(fd) for fd in fds if os.path.exists(fd)]"
    )
    links = ended(worker.run(code)).value
    assert not [link for link in links if link.endswith((".sock", ".log", ".py"))]
    assert ended(worker.run("import os; sorted(os.environ)")).value == [
        *("HOME", "LANG", "LOGNAME", "PATH", "TMPDIR", "USER")
    ]
    assert ended(worker.run("import sys; sys.stdin.read()")).value == ""


def test_a_large_variable_and_a_large_result_cross_whole(worker: Client) -> None:
    payload = os.urandom(8 << 20)
    status, reply, blobs = worker.post("data.hex()", blobs=[payload], variables={"data": {"$blob": [0, "bytes"]}})
    assert (status, reply["result"]["outcome"]) == (200, "ok")
    assert bytes(blobs[0]) == payload.hex().encode()


def test_an_execution_is_interrupted_while_it_waits_for_a_tool(worker: Client) -> None:
    worker.run("kept = 'alive'")
    progress = worker.run("search('x')")
    worker.box.host.request("POST", f"/v1/executions/{progress.execution_id}/interrupt")
    _, reply, _ = worker.claims(execution_id=progress.execution_id, wait_s=20)
    assert reply["result"]["outcome"] == "interrupted"
    assert ended(worker.run("kept")).value == "alive"


def test_many_sessions_open_at_once(real: InProcessBroker) -> None:
    clients: list[Client] = []
    threads = [threading.Thread(target=lambda: clients.append(Client.open(real))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({client.session_id for client in clients}) == 8
    assert [ended(client.run("6 * 7")).value for client in clients] == [42] * 8
    for client in clients:
        assert client.close() == 200


def test_when_the_broker_ends_its_workers_end_and_leave_nothing() -> None:
    with InProcessBroker() as box:
        client = Client.open(box)
        pid, home = ended(client.run("import os; (os.getpid(), os.getcwd())")).value
        box.stop()
        assert not Path(f"/proc/{pid}").exists()
        assert not Path(home).exists()
