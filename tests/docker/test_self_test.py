"""The self-test of a real sandbox: it passes as we make them, and sees each weakness that we build in."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest

from broker.protocol.self_test import Check
from broker.supervisor import landlock
from host_client import SandboxInterpreter, SandboxSettings
from host_client.errors import SandboxTooWeak
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.providers.isolation import Isolation
from host_client.providers.launch import self_test
from host_client.runtime_dir import RuntimeDir
from host_client.transport import UnixSocketTransport
from tests.docker.sandboxes import engine, image, leaks, runtime, settings

pytestmark = pytest.mark.docker

__all__ = ["engine", "image", "runtime", "settings"]

LET_ALL_THROUGH = {"defaultAction": "SCMP_ACT_ALLOW"}


def checks_of(settings: SandboxSettings, isolation: Isolation) -> dict[str, Check]:
    """What a sandbox of this make finds; judged by what ours should be."""
    provider = DockerProvider(isolation_of=lambda _: dataclasses.replace(isolation, enforced=False))
    handle = provider.start(settings)
    try:
        with contextlib.closing(UnixSocketTransport(handle.socket_path)) as transport:
            return {check.name: check for check in self_test(transport, settings, Isolation.of(settings))}
    finally:
        provider.stop(handle)


def weak(checks: dict[str, Check]) -> set[str]:
    return {check.name for check in checks.values() if not check.held}


@pytest.fixture
def strong(settings: SandboxSettings, runtime: RuntimeDir) -> dict[str, Check]:
    return checks_of(settings, Isolation())


def test_our_own_sandbox_holds(strong: dict[str, Check]) -> None:
    assert weak(strong) == set()
    assert {"user", "capabilities", "io_uring", "AF_ALG", "broker's memory", "broker", "memory"} <= set(strong)
    assert strong["Landlock"].found == (f"on, version {landlock.abi()}" if landlock.abi() else "not in this kernel")


def test_without_the_filter_sockets_io_uring_and_user_namespaces_are_noticed(
    settings: SandboxSettings, runtime: RuntimeDir
) -> None:
    found = weak(checks_of(settings, Isolation(seccomp=LET_ALL_THROUGH)))
    assert {"internet sockets", "io_uring"} <= found <= {"internet sockets", "io_uring", "user namespaces", "AF_ALG"}


def test_without_users_of_their_own_nearly_everything_is_noticed(
    settings: SandboxSettings, runtime: RuntimeDir
) -> None:
    found = weak(checks_of(settings, Isolation(separate_users=False, landlock=False)))
    assert {"user", "host's socket", "Landlock", "supervisor's capabilities", "broker"} <= found


def test_the_network_is_noticed(settings: SandboxSettings, runtime: RuntimeDir) -> None:
    assert weak(checks_of(settings, Isolation(network="bridge"))) == {"network interfaces"}


def test_one_capability_too_many_is_noticed(settings: SandboxSettings, runtime: RuntimeDir) -> None:
    isolation = Isolation(capabilities=(*Isolation().capabilities, "NET_RAW"))
    assert weak(checks_of(settings, isolation)) == {"supervisor's capabilities"}


def test_a_smaller_limit_than_the_engine_gave_is_noticed(settings: SandboxSettings, runtime: RuntimeDir) -> None:
    provider = DockerProvider()
    handle = provider.start(settings)
    asked = dataclasses.replace(settings, memory=512 << 20, cpus=0.5, pids=100)
    with contextlib.closing(UnixSocketTransport(handle.socket_path)) as transport:
        found = self_test(transport, asked, Isolation())
    provider.stop(handle)
    assert {check.name for check in found if not check.held} == {"memory", "cores", "processes and threads"}


@pytest.fixture
def loose_profile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("profile") / "loose.json"
    file.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    return str(file)


def test_a_weaker_sandbox_is_refused_and_nothing_is_left(
    settings: SandboxSettings, runtime: RuntimeDir, engine: DockerEngine, loose_profile: str
) -> None:
    with pytest.raises(SandboxTooWeak, match="io_uring: wanted refused, found possible"):
        DockerProvider().start(dataclasses.replace(settings, seccomp=loose_profile))
    assert leaks(engine, runtime) == []


def test_insecure_runs_in_it_all_the_same(settings: SandboxSettings, runtime: RuntimeDir, loose_profile: str) -> None:
    accepted = dataclasses.replace(settings, seccomp=loose_profile, insecure=True)
    with SandboxInterpreter(settings=accepted) as interpreter:
        assert interpreter.execute("import socket; socket.socket(socket.AF_INET).close(); 1 + 1") == 2


@pytest.mark.skipif(landlock.abi() == 0, reason="this kernel has no Landlock")
def test_a_session_cannot_make_itself_harder_to_kill_after_an_exec(
    settings: SandboxSettings, runtime: RuntimeDir
) -> None:
    code = (
        "import subprocess\n"
        "subprocess.run(['sh', '-c', 'echo 0 > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj'], "
        "capture_output=True, text=True).stdout.strip()"
    )
    with SandboxInterpreter(settings=settings) as interpreter:
        assert interpreter.execute(code) == "1000"
    without = DockerProvider(isolation_of=lambda _: Isolation(landlock=False, enforced=False))
    with SandboxInterpreter(settings=settings, provider=without) as interpreter:
        assert interpreter.execute(code) == "0", "Landlock is what keeps it"
