"""The supervisor with uids of their own, as in the container. Needs root, and a Python that other users can run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.messages import Outcome, Progress
from broker.testing import PlaneClient

ROOT = Path(__file__).parents[2]
SLOTS = 4
# Uids of this run alone: a second run at the same time would count, and kill, our processes.
BROKER_UID = 1_000_000 + 32 * os.getpid()
GUEST_UID_BASE = BROKER_UID + 1


def python_for_all() -> str | None:
    """Return a Python of our version that another user can execute."""
    for candidate in (os.path.realpath(sys.executable), shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")):
        if candidate is None:
            continue
        code = f"import sys; assert sys.version_info[:2] == {sys.version_info[:2]}"
        with contextlib.suppress(OSError):
            other = {"user": BROKER_UID, "group": BROKER_UID, "extra_groups": ()}
            if subprocess.run([candidate, "-c", code], cwd="/", capture_output=True, **other).returncode == 0:
                return candidate
    return None


pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it runs processes under other uids"),
    pytest.mark.skipif(
        os.geteuid() == 0 and python_for_all() is None, reason="no Python of this version that another user can execute"
    ),
]


@dataclasses.dataclass
class Sandbox:
    """A supervisor with its broker, outside of a container."""

    process: subprocess.Popen[str]
    host: PlaneClient
    folder: Path

    def open(self) -> str:
        status, session, _ = self.host.request("POST", "/v1/sessions")
        assert status == 201, session
        return str(session["session_id"])

    def run(self, session: str, code: str, *, execution_id: str | None = None, **fields: Any) -> Any:
        execution_id = execution_id or os.urandom(8).hex()
        payload = {"execution_id": execution_id, "code": code, **fields}
        status, reply, _ = self.host.request("POST", f"/v1/sessions/{session}/executions?wait_s=20", payload)
        assert status == 200, reply
        progress = Progress.from_json(reply)
        return progress.result if progress.result is not None else progress

    def broker_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if _uid(int(pid)) == BROKER_UID)


def _uid(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Uid")).split()[1])


def processes_of(uids: range) -> list[int]:
    """Return the processes of these users; zombies have ended and only wait for their parent."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, StopIteration):
            if name.isdigit() and _uid(int(name)) in uids and "Z" not in _state(int(name)):
                found.append(int(name))
    return found


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def files_of(uids: range) -> list[str]:
    found = []
    for folder in ("/tmp", "/dev/shm"):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):  # somebody else's, just removed
                if entry.stat(follow_symlinks=False).st_uid in uids:
                    found.append(entry.path)
    return found


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    folder = Path(tempfile.mkdtemp(prefix="rlm-supervisor-"))
    folder.chmod(0o755)
    # What the container's mounts are: see the module docstring of broker.supervisor.config.
    for name, mode in (("host", 0o700), ("guest", 0o711)):
        (folder / name).mkdir()
        (folder / name).chmod(mode)
        os.chown(folder / name, BROKER_UID, BROKER_UID)
    config = {
        "broker_uid": BROKER_UID,
        "broker_gid": BROKER_UID,
        "guest_uid_base": GUEST_UID_BASE,
        "max_sessions": SLOTS,
        "host_socket": str(folder / "host" / "host.sock"),
        "guest_socket": str(folder / "guest" / "guest.sock"),
        "environment": {"COLOUR": "blue"},
        "broker_site": sysconfig.get_path("purelib"),
        "nproc": 200,
        "allowed_host_uids": [0],
    }
    python = python_for_all()
    assert python is not None
    process = subprocess.Popen(
        [python, "-m", "broker.supervisor", json.dumps(config)],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()  # the broker's first line in the log says that it serves
    assert '"serving"' in line, line + (process.stderr.read() if process.poll() is not None else "")
    box = Sandbox(process, PlaneClient(Path(config["host_socket"])), folder)
    yield box
    box.host.close()
    process.terminate()
    process.wait(20)
    process.stderr.close()
    shutil.rmtree(folder)
    uids = range(BROKER_UID, GUEST_UID_BASE + 2 * SLOTS)
    assert processes_of(uids) == []
    assert files_of(uids) == []


def test_a_session_runs_under_its_own_uid_without_any_privilege(sandbox: Sandbox) -> None:
    first, second = sandbox.open(), sandbox.open()
    for slot, session in enumerate((first, second)):
        code = "import os\n(os.getresuid(), os.getresgid(), os.getgroups())"
        uid = GUEST_UID_BASE + slot
        assert sandbox.run(session, code).value == [[uid] * 3, [uid] * 3, []]
        status = dict(
            line.split(":\t", 1)
            for line in sandbox.run(session, "open('/proc/self/status').read()").value.splitlines()
            if ":\t" in line
        )
        assert (status["CapEff"], status["CapPrm"], status["CapInh"]) == ("0" * 16,) * 3
        assert status["NoNewPrivs"] == "1"


def test_a_session_has_its_limits_its_environment_and_its_home(sandbox: Sandbox) -> None:
    session = sandbox.open()
    code = (
        "import os, resource, stat\n"
        "[resource.getrlimit(resource.RLIMIT_NPROC), resource.getrlimit(resource.RLIMIT_NOFILE),"
        " resource.getrlimit(resource.RLIMIT_CORE), open('/proc/self/oom_score_adj').read().strip(),"
        " os.getcwd() == os.environ['HOME'] == os.environ['TMPDIR'], oct(os.stat('.').st_mode), oct(os.umask(0o77)),"
        " os.environ['USER'], os.environ['LANG'], os.environ['COLOUR'], os.getsid(0) == os.getpid(), os.listdir('.')]"
    )
    assert sandbox.run(session, code).value == [
        *([200, 200], [4096, 4096], [0, 0], "1000"),
        *(True, "0o40700", "0o77", "guest", "C.UTF-8", "blue", True, []),
    ]


@pytest.mark.parametrize(
    "code",
    [
        "open('{folder}/host/host.sock')",
        "import os; os.listdir('{folder}/host')",
        "import os; os.listdir('{folder}/guest')",
        "open('{folder}/guest/mine', 'w')",
        "import os; os.unlink('{folder}/guest/guest.sock')",
        "open('/proc/{broker}/environ').read()",
        "open('/proc/{broker}/mem', 'rb').read(1)",
        "import os; os.listdir('/proc/{broker}/fd')",
        "open('/proc/{supervisor}/environ').read()",
        "import os; os.kill({broker}, 0)",
        "import os; os.kill({supervisor}, 0)",
        "import os; os.kill(os.getppid(), 0)",  # the zygote
        "import os; open(f'/proc/{{os.getppid()}}/environ').read()",
        "import os; os.listdir(f'/proc/{{os.getppid()}}/fd')",
        "import os; os.setuid(0)",
        "import socket; socket.socket(socket.AF_UNIX).connect('{folder}/host/host.sock')",
    ],
)
def test_generated_code_cannot_reach_the_broker_or_the_supervisor(sandbox: Sandbox, code: str) -> None:
    session = sandbox.open()
    names = {"folder": sandbox.folder, "broker": sandbox.broker_pid(), "supervisor": sandbox.process.pid}
    result = sandbox.run(session, code.format(**names))
    assert result.outcome is Outcome.RAISED
    assert result.error.type == "PermissionError", result.error


def test_a_session_cannot_speak_for_another(sandbox: Sandbox) -> None:
    mine, other = sandbox.open(), sandbox.open()
    tools = [{"name": "search", "parameters": None}]
    waiting = sandbox.run(mine, "search('x')", execution_id="mine", tools=tools)
    [claim] = waiting.claims
    steal = (
        "import http.client, socket\n"
        "c = http.client.HTTPConnection('x')\n"
        f"c.sock = socket.socket(socket.AF_UNIX); c.sock.connect('{sandbox.folder}/guest/guest.sock')\n"
        "c.request({request})\n"
        "c.getresponse().read().decode()"
    )
    read = f"'GET', '/v1/tool-calls/{claim.call_id}'"
    assert "unknown_call" in sandbox.run(other, steal.format(request=read)).value
    body = json.dumps({"key": "k", "execution_id": "mine", "tool": "search"})
    submit = f"'POST', '/v1/tool-calls', {body!r}"
    # While it runs this very code, its own execution is another one than the one that it names.
    assert "execution_ended" in sandbox.run(other, steal.format(request=submit)).value


def test_a_fork_bomb_ends_with_its_session_and_hurts_no_sibling(sandbox: Sandbox) -> None:
    sibling, bomber = sandbox.open(), sandbox.open()
    sandbox.run(sibling, "kept = 'alive'")
    code = (
        "import os, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
        "while True:\n"
        "    try:\n"
        "        os.fork()\n"
        "        os.setsid()\n"
        "    except OSError: pass\n"
    )
    result = sandbox.run(bomber, code, timeout_s=0.5)
    assert (result.outcome, result.session_lost) == (Outcome.TIMED_OUT, "deadline")
    assert sandbox.run(sibling, "kept").value == "alive"
    assert sandbox.host.request("DELETE", f"/v1/sessions/{bomber}")[0] == 200
    again = sandbox.open()  # the slot, or another one
    assert sandbox.run(again, "1 + 1").value == 2
    assert len(processes_of(range(GUEST_UID_BASE, GUEST_UID_BASE + SLOTS))) == 2


def test_processes_that_shoot_back_cannot_stop_the_sweep(sandbox: Sandbox) -> None:
    session = sandbox.open()
    code = (
        "import os, signal\n"
        "for _ in range(20):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
        "        me = os.getpid()\n"
        "        while True:\n"
        "            for pid in os.listdir('/proc'):\n"
        "                if pid.isdigit() and int(pid) != me and os.stat(f'/proc/{pid}').st_uid != os.getuid():\n"
        "                    try: os.kill(int(pid), 9)\n"
        "                    except OSError: pass\n"
    )
    sandbox.run(session, code)
    status, closed, _ = sandbox.host.request("DELETE", f"/v1/sessions/{session}")
    assert (status, closed["state"]) == (200, "closed")
    assert processes_of(range(GUEST_UID_BASE, GUEST_UID_BASE + 2 * SLOTS)) == []


def test_the_files_of_a_session_go_with_it_however_deep_and_locked(sandbox: Sandbox) -> None:
    session = sandbox.open()
    code = (
        "import os\n"
        "for base in ('/tmp/mine', '/dev/shm/mine'):\n"
        "    os.makedirs(base); os.chdir(base)\n"
        "    for n in range(300):\n"
        "        open('file', 'w').close(); os.mkdir('d' * 40); os.chdir('d' * 40)\n"
        "    os.chmod('/tmp/mine', 0)\n"
        "os.symlink('/etc', '/tmp/mylink')\n"
        "os.mkfifo('/tmp/myfifo')\n"
    )
    result = sandbox.run(session, code)
    assert result.outcome is Outcome.OK, result.error
    uids = range(GUEST_UID_BASE, GUEST_UID_BASE + SLOTS)
    assert len(files_of(uids)) >= 4
    sandbox.host.request("DELETE", f"/v1/sessions/{session}")
    assert files_of(uids) == []
    assert Path("/etc/passwd").exists()


def test_an_orphan_is_reaped(sandbox: Sandbox) -> None:
    session = sandbox.open()
    code = (
        "import os, time\n"
        "r, w = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0: os.write(w, str(os.getpid()).encode())\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "int(os.read(r, 20))"
    )
    pid = sandbox.run(session, code).value
    sandbox.run(session, "1")
    deadline = select.poll()  # no sleeping: a pidfd is readable once the process has ended
    try:
        deadline.register(os.pidfd_open(pid), select.POLLIN)
        assert deadline.poll(10_000)
    except ProcessLookupError:
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_brokers_death_ends_everything(sandbox: Sandbox, number: signal.Signals) -> None:
    sandbox.run(sandbox.open(), "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)")
    os.kill(sandbox.broker_pid(), number)
    assert sandbox.process.wait(10) == 128 + (signal.SIGTERM if number == signal.SIGKILL else number)
    assert processes_of(range(BROKER_UID, GUEST_UID_BASE + 2 * SLOTS)) == []


def test_sigterm_is_an_orderly_end(sandbox: Sandbox) -> None:
    sandbox.run(sandbox.open(), "1")
    sandbox.process.terminate()
    assert sandbox.process.wait(10) == 0
    assert not (sandbox.folder / "host" / "host.sock").exists()


def test_a_supervisor_that_is_killed_takes_broker_and_workers_along(sandbox: Sandbox) -> None:
    sandbox.run(sandbox.open(), "1")
    pids = processes_of(range(BROKER_UID, GUEST_UID_BASE + SLOTS))
    handles = [os.pidfd_open(pid) for pid in pids]
    assert len(handles) == 2
    sandbox.process.kill()
    for handle in handles:
        assert select.select([handle], [], [], 10)[0]
        os.close(handle)
    for path in files_of(range(GUEST_UID_BASE, GUEST_UID_BASE + SLOTS)):
        shutil.rmtree(path)  # nobody is left to do it; in a container /tmp goes with it


def test_a_stranger_is_refused_on_the_hosts_socket(sandbox: Sandbox) -> None:
    path = sandbox.folder / "host" / "host.sock"
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            sock = socket.socket(socket.AF_UNIX)
            (sandbox.folder / "host").chmod(0o755)
            path.chmod(0o666)
            os.setresuid(*[BROKER_UID + 31] * 3)
            sock.connect(str(path))
            sock.sendall(b"GET /v1/health HTTP/1.1\r\n\r\n")
            theirs.sendall(sock.recv(65536))
        finally:
            os._exit(0)
    theirs.close()
    os.waitpid(pid, 0)
    answer = ours.recv(65536)
    ours.close()
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b'"forbidden"' in answer
