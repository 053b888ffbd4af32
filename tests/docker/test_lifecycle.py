"""Sandboxes in a real engine: they start, they end, and nothing is left, however their host ends."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from host_client.errors import BadSetting, ImageMissing, UnknownSandbox
from host_client.providers import container_spec
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.providers.launch import NameTaken
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from host_client.status_table import count_sessions
from host_client.transport import UnixSocketTransport
from tests.docker.sandboxes import engine, image, leaks, provider, run_host, runtime, settings

pytestmark = pytest.mark.docker

__all__ = ["engine", "image", "provider", "runtime", "settings"]


def wait_for_end(engine: DockerEngine, sandbox_id: str) -> None:
    """Return when a container has ended; the engine tells, nobody polls."""
    for _ in engine.follow_logs(sandbox_id):
        pass


def test_a_sandbox_starts_answers_and_leaves_nothing(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    handle = provider.start(settings)
    assert count_sessions(UnixSocketTransport(handle.socket_path)) == 0
    assert provider.why_dead(handle) is None
    provider.stop(handle)
    provider.stop(handle)
    assert provider.why_dead(handle) == "removed"
    assert leaks(engine, runtime) == []


def test_eight_starts_at_once_share_no_uid_and_leave_no_thread_or_descriptor(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    provider.stop(provider.start(settings))
    engine.close()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(lambda _: provider.start(settings), range(8)))
        bases = {json.loads(engine.inspect(h.sandbox_id)["Args"][-1])["guest_uid_base"] for h in handles}
        engine.close()
        counts = [count_sessions(UnixSocketTransport(handle.socket_path)) for handle in handles]
        list(pool.map(provider.stop, handles))
    assert len(bases) == 8
    assert counts == [0] * 8
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert leaks(engine, runtime) == []


ENDINGS = {
    "stop": ("handle = provider.start(settings); provider.stop(handle)", 0),
    "falls off the end": ("provider.start(settings)", 0),
    "exception": ("provider.start(settings); raise ValueError('boom')", 1),
    "sys.exit": ("provider.start(settings); sys.exit(3)", 3),
    "Ctrl-C": ("provider.start(settings); signal.raise_signal(signal.SIGINT)", -2),
    "Ctrl-C during the start": (
        "import threading\n"
        "from host_client.providers import launch\n"
        "original = launch._wait_until_healthy\n"
        "def interrupted(*args):\n"
        "    threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
        "    original(*args)\n"
        "    signal.pause()\n"
        "launch._wait_until_healthy = interrupted\n"
        "provider.start(settings)",
        -2,
    ),
    "in a multiprocessing child": (
        "import multiprocessing\n"
        "child = multiprocessing.get_context('fork').Process(target=provider.start, args=(settings,))\n"
        "child.start(); child.join(); sys.exit(child.exitcode)",
        0,
    ),
    "forked child exits while the parent goes on": (
        "handle = provider.start(settings)\n"
        "pid = os.fork()\n"
        "if pid == 0: sys.exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "sys.exit(0 if provider.why_dead(handle) is None else 9)",
        0,
    ),
}


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_nothing_is_left_however_the_host_ends(
    ending: str, image: str, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    code, expected = ENDINGS[ending]
    host = run_host(code, image)
    _, errors = host.communicate(timeout=60)
    assert host.returncode == expected, errors
    assert leaks(engine, runtime) == []


def test_what_a_killed_host_leaves_is_gone_after_the_next_start(
    image: str, provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    killed = run_host("print(provider.start(settings).sandbox_id, flush=True); sys.stdin.read()", image)
    living = run_host("print(provider.start(settings).sandbox_id, flush=True); sys.stdin.read()", image)
    assert killed.stdout is not None
    assert living.stdout is not None
    orphan, sibling = killed.stdout.readline().strip(), living.stdout.readline().strip()
    killed.kill()
    killed.communicate()
    assert any(orphan in leak for leak in leaks(engine, runtime))
    provider.stop(provider.start(settings))
    left = leaks(engine, runtime)
    assert orphan not in left
    assert sibling in left
    assert len(left) == 3, "the sibling's container, directory and reservation"
    living.communicate()
    assert leaks(engine, runtime) == []


def test_a_sandbox_whose_host_is_gone_ends_itself(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_spec, "LINGER_S", 0.2)
    handle = provider.start(settings)
    wait_for_end(engine, handle.sandbox_id)
    assert provider.why_dead(handle) == "exited(0)"


def test_why_a_sandbox_died_is_told(provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine) -> None:
    killed, ended, removed = (provider.start(settings) for _ in range(3))
    engine.kill(killed.sandbox_id)
    wait_for_end(engine, killed.sandbox_id)
    assert provider.why_dead(killed) == "killed"
    engine.kill(ended.sandbox_id, "TERM")
    wait_for_end(engine, ended.sandbox_id)
    assert provider.why_dead(ended) == "exited(0)"
    engine.remove(removed.sandbox_id)
    assert provider.why_dead(removed) == "removed"


def test_a_named_sandbox_outlives_its_host_and_is_found_by_another(
    image: str, provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    host = run_host("print(provider.start(settings, name='lifecycle-test').sandbox_id)", image)
    output, errors = host.communicate(timeout=60)
    assert host.returncode == 0, errors
    handle = provider.find("lifecycle-test")
    assert handle.sandbox_id == output.strip()
    assert not handle.owned
    assert count_sessions(UnixSocketTransport(handle.socket_path)) == 0
    provider.stop(provider.start(settings))
    assert provider.why_dead(handle) is None, "the reaper spares it"
    with pytest.raises(NameTaken, match="already running"):
        provider.start(settings, name="lifecycle-test")
    engine.kill(handle.sandbox_id)
    again = provider.start(settings, name="lifecycle-test")
    provider.stop(again)
    assert leaks(engine, runtime) == []
    with pytest.raises(UnknownSandbox):
        provider.find("lifecycle-test")


def test_what_cannot_be_started_says_why_and_leaves_nothing(
    provider: DockerProvider, image: str, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    with pytest.raises(ImageMissing, match="rlm-sandbox image"):
        provider.start(SandboxSettings(image="rlm-sandbox:there-is-none"))
    with pytest.raises(BadSetting, match="does not know this runtime"):
        provider.start(SandboxSettings(image=image, runtime="no-such-runtime"))
    assert leaks(engine, runtime) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_who_is_merely_in_the_docker_group_can_use_it(
    provider: DockerProvider,
    settings: SandboxSettings,
    engine: DockerEngine,
    runtime: RuntimeDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Loads whatever is loaded late: afterwards this interpreter's own files may be out of reach.
    provider.stop(provider.start(settings))
    user, home = 54_321, runtime.path.parent / "home"
    home.mkdir()
    os.chown(home, user, user)
    runtime.path.parent.chmod(0o755)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RLM_SANDBOX_RUNTIME_DIR", str(home / "r"))
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(_use_as(user, settings))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert leaks(engine, runtime) == []
    assert sorted(path.name for path in (home / "r").iterdir()) == ["lock", "uids"]


def _use_as(user: int, settings: SandboxSettings) -> int:
    """Start, ask and stop as that user; return 0, or the number of the step that went wrong."""
    os.setgroups([os.stat("/var/run/docker.sock").st_gid])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    provider = DockerProvider()
    handle = provider.start(settings)
    socket = handle.socket_path.stat()
    if (socket.st_uid, socket.st_mode & 0o777) != (user, 0o600):
        return 1
    if handle.socket_path.parent.stat().st_mode & 0o777 != 0o700:
        return 2
    if count_sessions(UnixSocketTransport(handle.socket_path)) != 0:
        return 3
    provider.stop(handle)
    return 0 if not Path(handle.socket_path).parent.exists() and provider.why_dead(handle) == "removed" else 4
