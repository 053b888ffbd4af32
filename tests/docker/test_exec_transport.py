"""The broker reached through a relay in its container, with the engine of this machine: the same promises, and faults."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from host_client import SandboxInterpreter, SandboxSettings, doctor, tool
from host_client.connected_sandbox import transport_to
from host_client.errors import SessionLost, UnknownSandbox
from host_client.providers.base import SandboxHandle
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.runtime_dir import RuntimeDir
from host_client.status_table import count_sessions
from tests.docker.sandboxes import engine, image, leaks, provider, run_host, runtime
from tests.docker.tcp_engine import tcp_engine

__all__ = ["engine", "image", "provider", "runtime"]

pytestmark = pytest.mark.docker


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
    [sandbox_id] = provider._process.owned
    [pid] = relays(engine, sandbox_id)
    os.kill(pid, signal.SIGKILL)


def test_a_relayed_sandbox_shares_no_file_and_leaves_nothing(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    threads = threading.active_count()
    with interpreter(provider, settings, up=str.upper) as made:
        assert made.execute("x = 6 * 7\nup(f'is {x}')") == "IS 42"
        [sandbox_id] = provider._process.owned
        assert engine.inspect(sandbox_id)["Mounts"] == []
        assert len(relays(engine, sandbox_id)) == 1, "one for the start, the self-test and the session"
    assert leaks(engine, runtime) == []
    for thread in threading.enumerate():
        if thread.name.startswith("relay-"):
            thread.join(10)
    assert threading.active_count() <= threads + 1  # who ends sandboxes in the background stays


def test_large_values_and_a_hundred_calls_at_once_go_through_one_relay(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine
) -> None:
    with interpreter(provider, settings, size=len, up=str.upper) as made:
        large = "0123456789abcdef" * (1 << 20)
        code = (
            "from concurrent.futures import ThreadPoolExecutor\n"
            "with ThreadPoolExecutor(100) as threads:\n"
            "    answers = list(threads.map(lambda n: up(f'a{n}'), range(300)))\n"
            "[len(large), size(large), answers == [f'A{n}' for n in range(300)]]"
        )
        assert made.execute(code, {"large": large}) == [len(large), len(large), True]
        assert made.execute("large[::-1]") == large[::-1]
        [sandbox_id] = provider._process.owned
        assert len(relays(engine, sandbox_id)) == 1


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
        [sandbox_id] = provider._process.owned
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
        import select

        poll = select.poll()
        for watch in watches:
            poll.register(watch, select.POLLIN)
        assert len(poll.poll(20_000)) == 1, "the one whose host was killed ends, ours stays"
        for watch in watches:
            os.close(watch)
    with contextlib.closing(transport_to(provider, handle)) as transport:
        assert transport.request("GET", "/v1/health", timeout_s=20).header["connections"] == 1
    provider.stop(handle)
