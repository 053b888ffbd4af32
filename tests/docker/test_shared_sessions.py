"""Named sessions in a real sandbox, shared by real processes: left, killed, raced for, expired, listed, closed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from broker.protocol.messages import ClaimRequest
from host_client import SandboxInterpreter, SandboxSettings, close_session, list_sessions
from host_client.errors import SessionLost, SessionNameTaken
from host_client.providers.docker import DockerProvider
from tests.docker.sandboxes import ROOT, engine, image, leaks, provider, run_host, runtime, settings

pytestmark = pytest.mark.docker

__all__ = ["engine", "image", "provider", "runtime", "settings"]

SANDBOX = f"shared-sessions-{os.getpid()}"
#: Other sandboxes of this engine may have sessions too.
SESSION = f"{SANDBOX}/novel"

CREATE = """
from host_client import SandboxInterpreter
def create(**keywords):
    return SandboxInterpreter.create("novel", sandbox=SANDBOX, provider=provider, settings=settings, **keywords)
"""
ATTACH = """
from host_client import SandboxInterpreter
from host_client.errors import SandboxError
print("ready", flush=True)
sys.stdin.readline()
try:
    interpreter = SandboxInterpreter.attach(SESSION, provider=provider, settings=settings)
except SandboxError as error:
    print(error.code, flush=True)
else:
    print("attached", flush=True)
    sys.stdin.readline()
    try:
        print(interpreter.execute("x = x + 1; x"), flush=True)
    except SandboxError as error:
        print(error.reason, flush=True)
"""


@pytest.fixture
def sandbox(provider: DockerProvider, settings: SandboxSettings, engine: Any, runtime: Any) -> Iterator[str]:
    """A named sandbox; nothing of it is left when it is stopped."""
    handle = provider.start(settings, name=SANDBOX)
    yield SANDBOX
    provider.stop(handle)
    assert leaks(engine, runtime) == []


def host(code: str, image: str) -> subprocess.Popen[str]:
    return run_host(code.replace("SANDBOX", repr(SANDBOX)).replace("SESSION", repr(SESSION)), image)


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    return printed


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RLM_SANDBOX_PROVIDER": "docker", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "host_client.cli", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_program_ends_and_others_go_on_list_and_close(sandbox: str, image: str, provider: DockerProvider) -> None:
    ended(host(CREATE + "create(ttl_s=7200).execute('x = 41')", image))  # no shutdown: the program just ends
    [session] = list_sessions(sandbox, provider=provider)
    assert (session.name, session.state, session.holder, session.ttl_s) == ("novel", "idle", None, 7200)
    assert (session.executions, (session.memory_bytes or 0) > 1 << 20) == (1, True)
    with SandboxInterpreter.attach(SESSION, provider=provider) as interpreter:
        assert interpreter.execute("x + 1") == 42
    listed = command("sessions", "--sandbox", sandbox)
    assert listed.stderr == ""
    assert [line.split()[:3] for line in listed.stdout.splitlines()] == [
        ["NAME", "SANDBOX", "STATE"],
        ["novel", sandbox, "idle"],
    ]
    everything = [json.loads(line) for line in command("sessions", "--json").stdout.splitlines()]
    [shown] = [each for each in everything if each["sandbox"] == sandbox]
    assert (shown["session_id"], shown["executions"], shown["holder"]) == (session.session_id, 2, None)
    closed = command("sessions", "close", SESSION)
    assert closed.stdout.startswith(f"closed {sandbox}/novel: idle, 2 executions, "), closed.stderr
    assert list_sessions(sandbox, provider=provider) == []
    unknown = command("sessions", "close", SESSION)
    assert (unknown.returncode, f"no session '{SESSION}'; there are none" in unknown.stderr) == (1, True)


def test_its_creator_is_killed_in_a_tool_call_and_another_goes_on(
    sandbox: str, image: str, provider: DockerProvider
) -> None:
    code = """
def effect():
    os.kill(os.getpid(), signal.SIGKILL)
create(tools={"effect": effect}).execute('''
x = 41
try: effect()
except Exception as error: seen = type(error).__name__
''')
"""
    killed = host(CREATE + code, image)
    ended(killed, -signal.SIGKILL)
    [session] = list_sessions(sandbox, provider=provider)
    assert (session.state, session.holder_pid, session.holder_gone) == ("running", killed.pid, True)
    with pytest.raises(SessionNameTaken, match=rf"\(process {killed.pid}\)"):
        SandboxInterpreter.create("novel", sandbox=sandbox, provider=provider)
    with SandboxInterpreter.attach(SESSION, provider=provider) as interpreter:
        interpreter.resume()
        assert interpreter.execute("x, seen") == [41, "ToolOutcomeUnknown"]
    close_session("novel", sandbox=sandbox, provider=provider)


def test_of_programs_that_attach_at_once_one_goes_on(sandbox: str, image: str, provider: DockerProvider) -> None:
    ended(host(CREATE + "create().execute('x = 0')", image))
    racers = [host(ATTACH, image) for _ in range(2)]
    assert [heard(racer) for racer in racers] == ["ready", "ready"]
    for racer in racers:
        tell(racer)
    began = [heard(racer) for racer in racers]
    assert set(began) <= {"attached", "fenced"}
    for racer, how in zip(racers, began, strict=True):
        if how == "attached":
            tell(racer)
    said = [ended(racer).strip() for racer in racers]
    # Whoever attached last holds it; the other one was told at once, or is told when it executes.
    assert sorted(filter(None, said)) == ["1", *["fenced"] * (began.count("attached") - 1)]
    with SandboxInterpreter.attach(SESSION, provider=provider) as interpreter:
        assert interpreter.execute("x") == 1
    close_session("novel", sandbox=sandbox, provider=provider)


def test_it_ends_at_its_time_to_live_with_no_program_there(sandbox: str, image: str, provider: DockerProvider) -> None:
    ended(host(CREATE + "create(ttl_s=0.5).execute('x = 1')", image))
    client = provider_client(provider)
    [session] = client.sessions()
    if session.lost is None:  # a long poll, answered by its end; who polls holds nothing
        client._epoch = session.epoch
        with pytest.raises(SessionLost) as lost:
            client.claim(session.session_id, ClaimRequest(limit=0, wait_s=20))
        assert lost.value.reason == "expired"
    client.close()
    with pytest.raises(SessionLost) as told:
        SandboxInterpreter.attach(SESSION, provider=provider)
    assert told.value.reason == "expired"
    with SandboxInterpreter.create("novel", sandbox=sandbox, provider=provider) as again:
        assert again.execute("'x' in globals()") is False


def provider_client(provider: DockerProvider) -> Any:
    from host_client.connected_sandbox import connect

    return connect(provider, provider.find(SANDBOX))
