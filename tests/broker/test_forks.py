"""Forks, snapshots and rollbacks, with real workers: each copy a process of its own in its session's slot."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker import supervisor_client, worker_link
from broker.protocol import limits
from broker.protocol.messages import Outcome, Progress
from broker.supervisor.births import Birth, Copy
from broker.testing import InProcessBroker
from tests.broker.conftest import Client


def value(progress: Progress) -> Any:
    assert progress.result is not None
    assert progress.result.outcome is Outcome.OK, progress.result
    return progress.result.value


def ask(client: Client, what: str, **body: Any) -> tuple[int, dict[str, Any]]:
    status, reply, _ = client.box.host.request("POST", f"/v1/sessions/{client.session_id}/{what}", body)
    return status, reply


def fork(client: Client, count: int = 1) -> list[Client]:
    status, reply = ask(client, "forks", count=count)
    assert status == 201, reply
    assert {each["forked_from"] for each in reply["sessions"]} == {client.session_id}
    return [Client(client.box, each["session_id"]) for each in reply["sessions"]]


def take(client: Client, **body: Any) -> dict[str, Any]:
    status, reply = ask(client, "snapshots", **body)
    assert status == 201, reply
    return reply


def roll_back(client: Client, snapshot: dict[str, Any]) -> None:
    status, reply = ask(client, "rollback", snapshot_id=snapshot["snapshot_id"])
    assert status == 200, reply


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def pair(worker: Client) -> Iterator[tuple[Client, Client]]:
    """A session with a name in it, and a fork of it."""
    worker.run("x = [1]")
    [branch] = fork(worker)
    yield worker, branch
    branch.close()


def test_a_fork_begins_with_the_namespace_and_goes_its_own_way(pair: tuple[Client, Client]) -> None:
    parent, branch = pair
    branch.run("x.append(2); y = 1")
    assert value(branch.run("x")) == [1, 2]
    assert value(parent.run("x")) == [1]
    parent.run("x.append(3)")
    assert value(branch.run("x")) == [1, 2]


def test_a_rollback_gives_the_namespace_as_it_was_again_and_again(worker: Client) -> None:
    worker.run("x = [1]")
    snapshot = take(worker, name="start")
    assert snapshot["name"] == "start"
    assert snapshot["not_kept"] == []
    for _ in range(3):
        assert value(worker.run("x.append(2); y = 1; x")) == [1, 2]
        roll_back(worker, snapshot)
        assert value(worker.run("x, 'y' in globals()")) == [[1], False]


def test_branches_execute_at_the_same_time_as_their_parent(pair: tuple[Client, Client]) -> None:
    parent, branch = pair
    assert parent.run("search('a')").claims
    [claim] = branch.run("search('b') + '!'").claims
    assert claim.args == ["b"]
    assert branch.answer(claim.call_id, "found") == 200
    _, reply, _ = branch.claims(execution_id=claim.execution_id, wait_s=20)
    assert reply["result"]["value"] == "found!"


def test_what_one_prints_the_other_does_not(pair: tuple[Client, Client]) -> None:
    parent, branch = pair
    parent.run("print('warm')")  # its pipe is kept from here on
    [second] = fork(parent)
    for client, text in ((second, "second\n"), (parent, "parent\n"), (branch, "branch\n")):
        result = client.run(f"print({text.strip()!r})").result
        assert result is not None
        assert result.output == text
    second.close()


def test_the_death_of_a_branch_is_its_own_and_has_its_reason(pair: tuple[Client, Client]) -> None:
    parent, branch = pair
    [other] = fork(branch)
    for code, reason, client in (
        ("os.kill(os.getpid(), 11)", "crashed(SIGSEGV)", branch),
        ("os._exit(3)", "exited(3)", other),
    ):
        result = client.run(f"import os; {code}").result
        assert result is not None
        assert (result.outcome, result.session_lost) == (Outcome.WORKER_DIED, reason)
    assert value(parent.run("x")) == [1]
    other.close()


def test_a_branch_outlives_its_parent_and_the_slot_is_swept_after_the_last(real: InProcessBroker) -> None:
    parent = Client.open(real)
    home = value(parent.run("import os; os.getcwd()"))
    [branch] = fork(parent)
    snapshot = take(parent)
    assert parent.close() == 200
    assert ask(parent, "rollback", snapshot_id=snapshot["snapshot_id"])[0] == 404
    assert value(branch.run("1 + 1")) == 2
    assert Path(home).exists()
    pid = value(branch.run("os.getpid()"))
    assert branch.close() == 200
    assert not Path(home).exists()
    assert not alive(pid)


def test_a_deadline_strikes_one_branch_and_its_namespace_is_kept(pair: tuple[Client, Client]) -> None:
    parent, branch = pair
    parent.post("search('wait')", wait_s=0)
    result = branch.run("while True: pass", timeout_s=0.2).result
    assert result is not None
    assert (result.outcome, result.session_lost) == (Outcome.TIMED_OUT, None)
    assert value(branch.run("x")) == [1]
    [claim] = Progress.from_json(parent.claims(wait_s=20)[1]).claims
    assert claim.args == ["wait"]


def test_code_that_ignores_signals_costs_one_branch(pair: tuple[Client, Client]) -> None:
    parent, branch = pair
    code = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\nwhile True: pass"
    result = branch.run(code, timeout_s=0.2).result
    assert result is not None
    assert result.session_lost == "deadline"
    assert value(parent.run("x")) == [1]


def test_what_cannot_be_copied_is_named(worker: Client) -> None:
    worker.run(
        "import socket, subprocess, threading\n"
        "stop = threading.Event()\n"
        "threading.Thread(target=stop.wait, name='watcher', daemon=True).start()\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "near, far = socket.socketpair()\n"
    )
    child, near, far = value(worker.run("child.pid, near.fileno(), far.fileno()"))
    snapshot = take(worker)
    ended = os.pidfd_open(child)
    assert snapshot["not_kept"] == [
        "thread 'watcher'",
        f"child process {child}",
        f"socket (descriptor {near})",
        f"socket (descriptor {far})",
    ]
    roll_back(worker, snapshot)
    assert value(worker.run("threading.active_count()")) == 1
    assert select.select([ended], [], [], 20)[0]  # it was a worker's that is gone
    os.close(ended)
    error = worker.run("near.send(b'x')").result
    assert error is not None
    assert error.error is not None
    assert "OSError" in error.error.type


def test_open_files_have_a_position_of_their_own(worker: Client) -> None:
    worker.run("file = open('lines', 'w+'); file.write('abcdef'); file.flush(); file.seek(0); file.read(1)")
    [branch] = fork(worker)
    assert value(branch.run("import os; os.lseek(file.fileno(), 3, 0)")) == 3
    assert value(worker.run("import os; os.lseek(file.fileno(), 0, 1)")) == 6
    branch.close()


def test_random_numbers_go_on_as_they_would_have(worker: Client) -> None:
    worker.run("import random; random.seed()")
    snapshot = take(worker)
    first = value(worker.run("random.random()"))
    roll_back(worker, snapshot)
    assert value(worker.run("random.random()")) == first
    [branch] = fork(worker)
    assert value(branch.run("random.random()")) == value(worker.run("random.random()"))
    branch.close()


def test_await_works_in_each_copy_and_waiting_tasks_are_named(worker: Client) -> None:
    worker.run("import asyncio\nleft = asyncio.create_task(asyncio.sleep(1000))\nawait asyncio.sleep(0)")
    snapshot = take(worker)
    assert "1 asyncio tasks" in snapshot["not_kept"]
    [branch] = fork(worker)
    for client in (branch, worker):
        assert value(client.run("await asyncio.sleep(0, 'slept')")) == "slept"
    roll_back(worker, snapshot)
    assert value(worker.run("await asyncio.sleep(0, 'slept')")) == "slept"
    branch.close()


def test_a_running_session_is_neither_forked_nor_rolled_back(worker: Client) -> None:
    snapshot = take(worker)
    worker.post("search('wait')", wait_s=0)
    for what, body in (("forks", {}), ("snapshots", {}), ("rollback", {"snapshot_id": snapshot["snapshot_id"]})):
        status, reply = ask(worker, what, **body)
        assert (status, reply["error"]["code"]) == (409, "session_busy")


def test_a_lost_session_says_so(worker: Client) -> None:
    snapshot = take(worker)
    worker.run("import os; os._exit(0)")
    for what, body in (("forks", {}), ("snapshots", {})):
        status, reply = ask(worker, what, **body)
        assert (status, reply["error"]["code"]) == (410, "session_lost")
    assert ask(worker, "rollback", snapshot_id=snapshot["snapshot_id"])[0] in (404, 410)


def test_a_snapshot_is_its_own_sessions_alone(pair: tuple[Client, Client]) -> None:
    parent, branch = pair
    snapshot = take(parent)
    status, reply = ask(branch, "rollback", snapshot_id=snapshot["snapshot_id"])
    assert (status, reply["error"]["code"]) == (404, "unknown_snapshot")
    assert branch.session_id in reply["error"]["message"]


def test_the_number_of_snapshots_is_bounded_and_dropping_makes_room(worker: Client) -> None:
    taken = [take(worker) for _ in range(limits.MAX_SNAPSHOTS)]
    status, reply = ask(worker, "snapshots")
    assert (status, reply["error"]["code"]) == (429, "too_many_snapshots")
    assert str(limits.MAX_SNAPSHOTS) in reply["error"]["message"]
    path = f"/v1/sessions/{worker.session_id}/snapshots"
    assert worker.box.host.request("DELETE", f"{path}/{taken[0]['snapshot_id']}")[0] == 200
    take(worker)
    _, listed, _ = worker.box.host.request("GET", path)
    assert len(listed["snapshots"]) == limits.MAX_SNAPSHOTS
    assert taken[0] not in listed["snapshots"]
    assert taken[1] in listed["snapshots"]


def test_more_forks_than_may_be_are_refused_and_none_is_left(worker: Client) -> None:
    before = worker.box.host.request("GET", "/v1/health")[1]["sessions"]
    status, reply = ask(worker, "forks", count=limits.MAX_FAMILY)
    assert (status, reply["error"]["code"]) == (429, "too_many_forks")
    assert worker.box.host.request("GET", "/v1/health")[1]["sessions"] == before
    assert value(worker.run("1 + 1")) == 2


def test_an_older_client_cannot_fork(worker: Client) -> None:
    worker.box.host.request("POST", f"/v1/sessions/{worker.session_id}/attach", {})
    assert ask(worker, "forks")[1]["error"]["code"] == "fenced"
    worker.box.host.request("DELETE", f"/v1/sessions/{worker.session_id}?epoch=2")


def test_a_worker_that_cannot_fork_says_why_and_goes_on(worker: Client) -> None:
    worker.run("x = 1")
    worker.run(
        "import resource, os\n"
        "from broker.worker import branching\n"
        "def fail(): raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
        "real, branching.os.fork = os.fork, fail"
    )
    status, reply = ask(worker, "forks")
    assert (status, reply["error"]["code"]) == (503, "fork_failed")
    assert "temporarily unavailable" in reply["error"]["message"]
    worker.run("os.fork = real")
    [branch] = fork(worker)
    assert value(branch.run("x")) == 1
    branch.close()


def test_rollbacks_and_dropped_snapshots_leave_no_process_behind(worker: Client) -> None:
    snapshot = take(worker)
    replaced = []
    for _ in range(5):
        replaced.append(os.pidfd_open(value(worker.run("import os; os.getpid()"))))
        roll_back(worker, snapshot)
    for process in replaced:
        assert select.select([process], [], [], 20)[0]
        os.close(process)
    waiting = value(worker.run("import os; os.getppid()"))  # the snapshot, which it was forked from
    ended = os.pidfd_open(waiting)
    path = f"/v1/sessions/{worker.session_id}/snapshots/{snapshot['snapshot_id']}"
    assert worker.box.host.request("DELETE", path)[0] == 200
    assert select.select([ended], [], [], 20)[0]
    os.close(ended)
    assert value(worker.run("1 + 1")) == 2


def test_the_reason_is_told_whoever_the_parent_is(worker: Client) -> None:
    [branch] = fork(worker)
    [grandchild] = fork(branch)
    branch.close()  # its child is the supervisor's from now on
    result = grandchild.run("import os; os.kill(os.getpid(), 6)").result
    assert result is not None
    assert result.session_lost == "crashed(SIGABRT)"


def test_ended_copies_are_reaped_by_the_one_that_they_come_from(worker: Client) -> None:
    for _ in range(4):
        [branch] = fork(worker)
        assert branch.close() == 200
    fork(worker)[0].close()
    code = "len(open(f'/proc/self/task/{__import__(\"os\").getpid()}/children').read().split())"
    assert value(worker.run(code)) <= 2  # the last one, reaped at the next fork, and perhaps the one before


def test_two_families_are_told_apart(real: InProcessBroker) -> None:
    clients = [Client.open(real) for _ in range(2)]
    branches = [fork(client)[0] for client in clients]
    seen: list[str] = []

    def call(client: Client) -> None:
        [claim] = client.run(f"search({client.session_id!r})").claims
        seen.append(claim.args[0] if claim.execution_id.startswith(client.session_id) else "wrong")
        client.answer(claim.call_id, None)

    threads = [threading.Thread(target=call, args=(client,)) for client in (*clients, *branches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(seen) == sorted(client.session_id for client in (*clients, *branches))
    for client in (*clients, *branches):
        client.close()


def test_a_worker_that_never_forks_is_not_waited_for_without_end(
    worker: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_client, "FORK_LIMIT_S", 0.2)
    monkeypatch.setattr(worker_link, "_FORKED_LIMIT_S", 0.2)
    worker.run("import os, threading; hang = threading.Event(); os.register_at_fork(before=lambda: hang.wait(2))")
    status, reply = ask(worker, "snapshots")
    assert (status, reply["error"]["code"]) == (503, "fork_failed")
    assert "within 0.2 s" in reply["error"]["message"]
    assert value(worker.run("hang.set(); 1 + 1", timeout_s=20)) == 2  # the late copy found nobody, and ended
    monkeypatch.undo()
    [branch] = fork(worker)
    assert value(branch.run("1 + 1")) == 2
    branch.close()


def test_an_answer_to_a_fork_that_makes_no_sense_ends_the_copy(worker: Client) -> None:
    worker.run("from broker.worker import branching; own = branching.not_kept; branching.not_kept = lambda *a: 'x'")
    assert ask(worker, "forks")[1]["error"]["code"] == "fork_failed"
    worker.run("branching.not_kept = own")
    assert fork(worker)[0].close() == 200


def test_who_speaks_first_is_told_by_the_kernel_and_descriptors_are_not_taken() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    read_end, write_end = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(theirs, [b"ready"], [read_end] * 10)
    birth = Birth(1, 0, socket.socket(fileno=os.dup(ours.fileno())))
    newborn = birth.look()
    assert newborn == (os.getpid(), os.getuid())
    birth.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert ours.recv(100) == b"ready"  # what it said is the broker's to read
    theirs.close()
    ended = Birth(1, 0, socket.socket(fileno=os.dup(ours.fileno())))
    assert ended.look() is None
    ended.close()
    for fd in (read_end, write_end):
        os.close(fd)
    ours.close()


def test_the_reason_of_a_childs_end_is_read_before_its_parent_reaps_it() -> None:
    go, told = os.pipe(), os.pipe()
    middle = os.fork()
    if middle == 0:
        child = os.fork()
        if child == 0:
            os.read(go[0], 1)
            os._exit(7)
        os.write(told[1], str(child).encode())
        os.kill(os.getpid(), signal.SIGSTOP)  # it reaps nobody
        os._exit(0)
    copy = Copy(int(os.read(told[0], 20)), 0, os.geteuid())
    os.write(go[1], b"x")
    assert select.select([copy], [], [], 20)[0]
    assert copy.status() == 7 << 8
    copy.signal(signal.SIGKILL)  # nobody is there any more
    copy.close()
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    for fd in (*go, *told):
        os.close(fd)
