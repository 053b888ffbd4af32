"""The broker reached through a relay in its container, on the engine of this machine: the same promises, and faults."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from host_client import SandboxInterpreter, SandboxPool, SandboxSettings, doctor
from host_client.connected_sandbox import transport_to
from host_client.errors import SessionLost, UnknownSandbox
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.providers.exec_tunnel import transport_by
from host_client.providers.isolation import Isolation
from host_client.runtime_dir import RuntimeDir
from host_client.status_table import count_sessions
from tests.docker.sandboxes import engine, image, leaks, provider, run_host, runtime
from tests.docker.tcp_engine import tcp_engine

__all__ = ["engine", "image", "provider", "runtime"]

pytestmark = pytest.mark.docker

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="looking at processes that cannot be dumped needs root")


@pytest.fixture
def settings(image: str, tmp_path: Path) -> SandboxSettings:
    return SandboxSettings(image=image, transport="exec", journal=str(tmp_path / "journal"))


@contextlib.contextmanager
def interpreter(
    provider: DockerProvider, settings: SandboxSettings, **tools: Callable[..., object]
) -> Iterator[SandboxInterpreter]:
    made = SandboxInterpreter(provider=provider, settings=settings, tools=tools, execution_timeout_s=60.0)
    try:
        yield made
    finally:
        made.shutdown()


def relays(engine: DockerEngine, sandbox_id: str) -> list[int]:
    """Pids, on the host, of the relays in a container."""
    namespace = os.readlink(f"/proc/{engine.inspect(sandbox_id)['State']['Pid']}/ns/pid")
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            same = folder.name.isdigit() and os.readlink(folder / "ns" / "pid") == namespace
            if same and b"broker.relay" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def kill_relay(engine: DockerEngine, provider: DockerProvider) -> None:
    [sandbox_id] = [each.sandbox_id for each in provider._process.owned.handles()]
    [pid] = relays(engine, sandbox_id)
    os.kill(pid, signal.SIGKILL)


@needs_root
def test_a_relayed_sandbox_shares_no_file_and_leaves_nothing(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    others = set(threading.enumerate())  # other tests' relays may still be there
    with interpreter(provider, settings, up=str.upper) as made:
        assert made.execute("x = 6 * 7\nup(f'is {x}')") == "IS 42"
        [sandbox_id] = [each.sandbox_id for each in provider._process.owned.handles()]
        assert engine.inspect(sandbox_id)["Mounts"] == []
        assert len(relays(engine, sandbox_id)) == 1, "one for the start, the self-test and the session"
    assert leaks(engine, runtime) == []
    own = [each for each in threading.enumerate() if each.name.startswith("relay-") and each not in others]
    for thread in own:
        thread.join(10)
    assert not [thread for thread in own if thread.is_alive()]


@needs_root
def test_large_values_and_a_hundred_calls_at_once_go_through_one_relay(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine
) -> None:
    with interpreter(provider, settings, size=len, up=str.upper) as made:
        large = "0123456789abcdef" * (1 << 18)
        code = (
            "from concurrent.futures import ThreadPoolExecutor\n"
            "with ThreadPoolExecutor(100) as threads:\n"
            "    answers = list(threads.map(lambda n: up(f'a{n}'), range(200)))\n"
            "[len(large), size(large), answers == [f'A{n}' for n in range(200)]]"
        )
        assert made.execute(code, {"large": large}) == [len(large), len(large), True]
        assert made.execute("large[::-1]") == large[::-1]
        [sandbox_id] = [each.sandbox_id for each in provider._process.owned.handles()]
        assert len(relays(engine, sandbox_id)) == 1


@needs_root
def test_a_relay_killed_at_each_step_loses_nothing_and_runs_nothing_twice(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine
) -> None:
    ran: list[str] = []

    def effect(text: str) -> str:
        ran.append(text)
        if text == "kill inside":
            kill_relay(engine, provider)
        return text.upper()

    with interpreter(provider, settings, effect=effect) as made:
        made.execute("kept = 1")
        kill_relay(engine, provider)
        assert made.execute("kept + 1") == 2, "killed between two executions"
        code = "print('before')\nkept = effect('kill inside')\nprint('after')\n[kept, effect('once more')]"
        assert made.execute(code) == ["KILL INSIDE", "ONCE MORE"]
        timer = threading.Thread(target=lambda: started.wait(30) and kill_relay(engine, provider))
        started = threading.Event()
        made.tools["started"] = lambda: started.set()
        timer.start()
        code = (
            "import time\nstarted()\nt = time.monotonic()\nwhile time.monotonic() < t + 1: pass\nprint('slept')\nkept"
        )
        assert made.execute(code) == "KILL INSIDE", "killed while the code computes"
        timer.join()
    assert ran == ["kill inside", "once more"]


@needs_root
def test_a_relay_killed_again_and_again_during_concurrent_calls(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine
) -> None:
    ran: dict[int, int] = {}
    lock, kill_at = threading.Lock(), {20, 60, 100}

    def effect(number: int) -> int:
        with lock:
            ran[number] = ran.get(number, 0) + 1
            kill = len(ran) in kill_at and not kill_at.discard(len(ran))
        if kill:
            kill_relay(engine, provider)
        return -number

    with interpreter(provider, settings, effect=effect) as made:
        code = (
            "from concurrent.futures import ThreadPoolExecutor\n"
            "with ThreadPoolExecutor(16) as threads:\n"
            "    answers = list(threads.map(effect, range(150)))\n"
            "answers == [-n for n in range(150)]"
        )
        assert made.execute(code) is True
    assert kill_at == set()
    assert ran == dict.fromkeys(range(150), 1), "COUNT=1 for each"


def test_a_sandbox_that_dies_is_a_lost_session_with_its_reason(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine
) -> None:
    def die() -> None:
        [sandbox_id] = [each.sandbox_id for each in provider._process.owned.handles()]
        engine.kill(sandbox_id)

    with interpreter(provider, settings, die=die) as made:
        with pytest.raises(SessionLost) as caught:
            made.execute("die()\nimport time\ntime.sleep(600)")
        assert caught.value.reason == "killed"


def test_named_sandboxes_are_started_found_attached_to_and_stopped(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    handle = provider.start(settings, name="dexec-named")
    other = DockerProvider()
    try:
        found = other.find("dexec-named")
        assert (found.sandbox_id, found.transport) == (handle.sandbox_id, "exec")
        first = SandboxInterpreter(sandbox="dexec-named", provider=other, session="s", settings=settings)
        first.execute("x = 'kept'")
        with contextlib.closing(transport_to(provider, handle)) as transport:
            assert transport.request("GET", "/v1/health", timeout_s=20).header["sessions"] == 1
        second = SandboxInterpreter.attach("dexec-named/s", provider=DockerProvider(), settings=settings)
        assert second.execute("x") == "kept"
        with pytest.raises(SessionLost, match="another client"):
            first.execute("x")
        second.shutdown()
    finally:
        provider.stop(handle)
    with pytest.raises(UnknownSandbox):
        other.find("dexec-named")
    assert leaks(engine, runtime) == []


@needs_root
def test_a_host_that_is_killed_leaves_no_relay_and_the_broker_sees_it_go(
    provider: DockerProvider, settings: SandboxSettings, image: str, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    handle = provider.start(settings, name="dexec-killed")
    code = (
        "from host_client.connected_sandbox import transport_to\n"
        "way = transport_to(provider, provider.find('dexec-killed'))\n"
        "way.request('GET', '/v1/health', timeout_s=30)\n"
        "print('connected', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with run_host(code, image) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "connected\n"
        pids = relays(engine, handle.sandbox_id)
        assert len(pids) == 2, "ours, and the other process's"
        watches = [os.pidfd_open(pid) for pid in pids]
        host.kill()
        poll = select.poll()
        for watch in watches:
            poll.register(watch, select.POLLIN)
        assert len(poll.poll(20_000)) == 1, "the one whose host was killed ends, ours stays"
        for watch in watches:
            os.close(watch)
    with contextlib.closing(transport_to(provider, handle)) as transport:
        assert transport.request("GET", "/v1/health", timeout_s=20).header["connections"] == 1
    provider.stop(handle)


def test_an_engine_behind_tcp_is_reached_by_a_relay_also_after_the_connection_was_cut(
    image: str,
    settings: SandboxSettings,
    engine: DockerEngine,
    runtime: RuntimeDir,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ran: list[str] = []

    def effect(text: str) -> str:
        ran.append(text)
        remote.cut()
        return text.upper()

    with tcp_engine() as remote, caplog.at_level("INFO", logger="host_client"):
        monkeypatch.setenv("DOCKER_HOST", remote.url)
        provider = DockerProvider()
        automatic = SandboxSettings(image=image, journal=settings.journal)
        with interpreter(provider, automatic, effect=effect) as made:
            assert made.execute("x = 1\neffect('cut')") == "CUT"
            assert made.execute("x") == 1
        assert "transport exec: the engine is reached at tcp://127.0.0.1:" in caplog.text
        assert leaks(engine, runtime) == []
    assert ran == ["cut"]


def test_doctor_says_which_transport_is_used_and_why(
    provider: DockerProvider, settings: SandboxSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.run(settings, provider=provider) == 0
    said = capsys.readouterr().out
    assert "Transport: exec (transport='exec' was asked for)" in said
    assert "WEAK" not in said


def test_status_counts_sessions_through_a_relay(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine
) -> None:
    with interpreter(provider, settings) as made:
        made.execute("1")
        [handle] = provider._process.owned.handles()
        assert count_sessions(transport_by(engine, handle)) == 1


@needs_root
def test_a_forked_child_gets_a_relay_of_its_own_and_the_parent_keeps_its(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine
) -> None:
    with interpreter(provider, settings) as made:
        made.execute("x = 1")
        [handle] = provider._process.owned.handles()
        session = made._session
        assert session is not None
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                session.client.check()
                os._exit(0 if len(relays(engine, handle.sandbox_id)) == 2 else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert made.execute("x") == 1


def test_a_pool_has_relayed_sandboxes_ready(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    with SandboxPool(name="dexec", min_size=1, max_size=2, provider=provider, settings=settings) as pool:
        assert pool.prewarm(wait=True)
        for _ in range(2):
            with pool.interpreter() as made:
                assert made.execute("before = 'x' in globals()\nx = 1\nbefore") is False
    assert leaks(engine, runtime) == []


#: What a session tries on a process that is not its own; ``pid`` is the relay's.
_ATTEMPTS = {
    "signal": "os.kill(pid, 18)",
    "signal by pidfd": "signal.pidfd_send_signal(os.pidfd_open(pid), 18)",
    "priority": "os.setpriority(os.PRIO_PROCESS, pid, 19)",
    "limits": "resource.prlimit(pid, resource.RLIMIT_NOFILE)",
    "connect to the host's socket": "socket.socket(socket.AF_UNIX).connect('/run/rlm-sandbox/host/host.sock')",
    "list the host's folder": "os.listdir('/run/rlm-sandbox/host')",
    "a socket beside it": "socket.socket(socket.AF_UNIX).bind('/run/rlm-sandbox/host/x.sock')",
    "its environment": "open(f'/proc/{pid}/environ', 'rb').read()",
    "its memory": "open(f'/proc/{pid}/mem', 'rb')",
    "its descriptors": "os.listdir(f'/proc/{pid}/fd')",
    "its input": "open(f'/proc/{pid}/fd/0', 'wb')",
    "its output": "open(f'/proc/{pid}/fd/1', 'wb')",
    "ptrace": "call(101, 16, pid, 0, 0)",
    "process_vm_readv": "call(310, pid, 0, 0, 0, 0, 0)",
    "pidfd_getfd": "call(438, os.pidfd_open(pid), 0, 0)",
    "become its user": "os.setuid(os.stat(f'/proc/{pid}').st_uid or 19999)",
}
_ATTACK = (
    "import ctypes, os, resource, signal, socket\n"
    "def relay():\n"
    "    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
    "        try:\n"
    "            if b'broker.relay' in open(f'/proc/{pid}/cmdline', 'rb').read():\n"
    "                return int(pid)\n"
    "        except OSError:\n"
    "            continue\n"
    "def call(number, *arguments):\n"
    "    libc = ctypes.CDLL(None, use_errno=True)\n"
    "    if libc.syscall(number, *map(ctypes.c_long, arguments)) < 0:\n"
    "        raise OSError(ctypes.get_errno(), 'refused')\n"
    "pid = relay()\n"
    "found = {}\n"
    f"for what, attempt in {_ATTEMPTS!r}.items():\n"
    "    try:\n"
    "        exec(attempt)\n"
    "        found[what] = 'worked'\n"
    "    except PermissionError:\n"
    "        found[what] = 'denied'\n"
    "    except OSError as error:\n"
    "        found[what] = f'{type(error).__name__} {error.errno}'\n"
    "[pid is not None, found]"
)
#: What the weakened build, with one user for all, gives away: the same attempts are no mistakes of the test.
_FALLS = {
    "signal",
    "signal by pidfd",
    "priority",
    "limits",
    "connect to the host's socket",
    "list the host's folder",
    "a socket beside it",
    "become its user",
}


def test_generated_code_reaches_neither_the_relay_nor_what_it_reaches(
    provider: DockerProvider, settings: SandboxSettings
) -> None:
    with interpreter(provider, settings) as made:
        saw_it, found = made.execute(_ATTACK)
        assert saw_it
        assert found == dict.fromkeys(_ATTEMPTS, "denied")


def test_the_same_attempts_work_in_the_weakened_build(runtime: RuntimeDir, settings: SandboxSettings) -> None:
    weak = Isolation(seccomp={"defaultAction": "SCMP_ACT_ALLOW"}, separate_users=False, landlock=False, enforced=False)
    provider = DockerProvider(isolation_of=lambda _: weak)
    with interpreter(provider, settings) as made:
        _, found = made.execute(_ATTACK)
        assert {what for what, how in found.items() if how == "worked"} >= _FALLS, found
