"""Attacks on forks, snapshots and rollbacks: the process that is forked is the attacker's own.

Of one family the members are one trust domain; nothing may reach beyond it, or cost the broker what it knows.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from host_client.errors import ForkFailed, SandboxError, SessionLost, UnknownSnapshot
from tests.adversarial.arena import Arena, Target

pytestmark = [pytest.mark.docker, pytest.mark.family("forks")]

#: Instead of forking, hand the new channel to whoever listens, of another family perhaps, and let him say "ready".
HAND_OVER = """
from broker.worker import branching

own = {channel_fd(), lane_fd()}

def hand_over():
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            fd = int(name)
            if fd not in own and stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(socket.AF_UNIX) as friend:
                    friend.connect(f"/tmp/{meeting}")
                    socket.send_fds(friend, [b"x"], [fd])
                    friend.recv(1)
                return 1
    return 1

branching.fork = lambda: not hand_over()
"""

ANSWER = """
listener = socket.socket(socket.AF_UNIX)
listener.bind(f"/tmp/{meeting}")
os.chmod(f"/tmp/{meeting}", 0o777)
listener.listen()

if os.fork() == 0:  # the broker knows the session's own process
    friend, _ = listener.accept()
    _, [fd], _, _ = socket.recv_fds(friend, 1, 1)
    os.write(fd, frame({"type": "ready", "pid": os.getpid()}))
    friend.send(b"x")
    time.sleep(1000)
"""


@pytest.fixture
def target(arena: Arena) -> Iterator[Target]:
    made = Target(arena, arena.shared())
    yield made
    with contextlib.suppress(SandboxError):
        made.close()


@pytest.fixture
def victim(arena: Arena) -> Iterator[Target]:
    made = Target(arena, arena.shared())
    yield made
    assert made.run("mark") == made.mark
    made.close()


def lost(target: Any) -> str:
    """Return why a session is lost, which it must be."""
    with pytest.raises(SessionLost) as caught:
        target.execute("1")
    return caught.value.reason


def impostor(attacker: Target, accomplice: Target) -> None:
    """Let a process of another session pose as the attacker's copy."""
    meeting = secrets.token_hex(8)
    accomplice.run(f"meeting = {meeting!r}\n{ANSWER}")
    attacker.run(f"meeting = {meeting!r}\n{HAND_OVER}")
    attacker.interpreter.fork()[0].shutdown()


def test_no_process_of_another_session_passes_for_a_copy(target: Target, victim: Target) -> None:
    with pytest.raises(ForkFailed, match="another process"):
        impostor(target, victim)
    assert target.run("mark") == target.mark


@pytest.mark.weakened
def test_in_the_weakened_build_it_does(weak_arena: Arena) -> None:
    attacker, accomplice = (Target(weak_arena, weak_arena.shared()) for _ in range(2))
    impostor(attacker, accomplice)
    for each in (attacker, accomplice):
        with contextlib.suppress(SandboxError):
            each.close()


def test_whoever_kills_all_that_he_can_kills_his_own_family_only(target: Target, victim: Target) -> None:
    snapshot = target.interpreter.snapshot()
    [branch] = target.interpreter.fork()
    with pytest.raises(SessionLost):
        branch.execute("os.kill(-1, 9)\nos.kill(os.getpid(), 9)")
    assert lost(target.interpreter) == "killed"
    snapshot.drop()
    branch.shutdown()
    fresh = Target(target.arena, target.arena.shared())  # the slot was swept, and is free
    assert fresh.run("1 + 1") == 2
    fresh.close()


def test_a_copy_that_talks_before_it_is_asked_is_refused_and_its_session_goes_on(target: Target) -> None:
    target.run(
        "def talk():\n"
        "    own = {channel_fd_before, lane_fd()}\n"
        "    for name in os.listdir('/proc/self/fd'):\n"
        "        with contextlib.suppress(OSError):\n"
        "            fd = int(name)\n"
        "            if fd not in own and stat.S_ISSOCK(os.fstat(fd).st_mode):\n"
        "                os.write(fd, frame({'type': 'result', 'execution_id': 'x', 'outcome': 'ok'}))\n"
        "channel_fd_before = channel_fd()\n"
        "os.register_at_fork(after_in_child=talk)"
    )
    with pytest.raises(ForkFailed):
        target.interpreter.snapshot()
    with pytest.raises(ForkFailed):
        target.interpreter.fork()
    assert target.run("mark") == target.mark


def test_a_branch_cannot_call_tools_in_the_name_of_another_family(target: Target, victim: Target) -> None:
    known = victim.run("[execution_id(), forged_call('tally')[1]['call_id']]")
    runs = victim.tools.runs["tally"]
    [branch] = target.interpreter.fork()
    status, answer = branch.execute(f"forged_call('tally', execution={known[0]!r}, wait_s=0)")
    assert (status, answer["error"]["code"]) == (409, "execution_ended")
    status, answer = branch.execute(f"guest('GET', '/v1/tool-calls/{known[1]}')")
    assert (status, answer["error"]["code"]) == (404, "unknown_call")
    assert victim.tools.runs["tally"] == runs
    branch.shutdown()


def test_a_fork_bomb_in_a_branch_takes_its_own_family_down_at_most(target: Target, victim: Target) -> None:
    [branch] = target.interpreter.fork()
    branch.execution_timeout_s = 3.0
    with pytest.raises(Exception, match=r"(?s).+"):
        branch.execute("while True:\n    with contextlib.suppress(OSError):\n        os.fork()")
    assert victim.run("mark") == victim.mark
    branch.shutdown()
    with contextlib.suppress(SandboxError):
        target.close()
    fresh = Target(target.arena, target.arena.shared())
    assert fresh.run("1 + 1") == 2
    fresh.close()


def test_what_a_copy_lacks_comes_as_harmless_text(target: Target) -> None:
    target.run(
        "stop = threading.Event()\n"
        "threading.Thread(target=stop.wait, name='\\x1b[2J\\nforged line', daemon=True).start()\n"
        "from broker.worker import branching\n"
        "own_words = branching.not_kept\n"
        "branching.not_kept = lambda *a: own_words(*a) + ['\\x1b]0;owned\\x07', '\\u202e', 'x' * 100_000]"
    )
    snapshot = target.interpreter.snapshot()
    assert len(snapshot.not_kept) == 4
    assert all(text.isprintable() and len(text) < 2_000 for text in snapshot.not_kept), snapshot.not_kept
    snapshot.drop()


def test_a_snapshot_whose_process_was_killed_is_refused_and_the_session_goes_on(target: Target) -> None:
    snapshot = target.interpreter.snapshot()
    target.run(
        "children = open(f'/proc/self/task/{os.getpid()}/children').read().split()\n"
        "for pid in children: os.kill(int(pid), 9)"
    )
    while snapshot.snapshot_id in [each.snapshot_id for each in target.interpreter.snapshots()]:
        pass  # until the broker has heard of it
    with pytest.raises(UnknownSnapshot, match="killed"):
        target.interpreter.rollback(snapshot)
    assert target.run("mark") == target.mark


def test_memory_that_branches_take_counts_in_the_sandboxs_limit(arena: Arena) -> None:
    target = Target(arena)  # a sandbox of its own
    branches = target.interpreter.fork(3)
    reasons = []
    for branch in branches:
        try:
            branch.execute("ballast = bytearray(os.urandom(1 << 20) * 120)")
        except Exception as error:
            reasons.append(str(error))
    assert any("oom" in reason or "MemoryError" in reason for reason in reasons), reasons
    for each in (*branches, target):
        with contextlib.suppress(SandboxError):
            each.shutdown() if each is not target else target.close()
