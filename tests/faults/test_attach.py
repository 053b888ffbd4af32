"""Going on with somebody else's session: how it is found, what is refused, and who ends what."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from broker.testing import InProcessBroker
from host_client import SandboxInterpreter, SandboxSettings, current_call, tool
from host_client.broker_client import HttpBrokerClient
from host_client.errors import BadSetting, Fenced, ForeignSession, SandboxError, SessionLost, UnknownSession
from host_client.providers.container_spec import LABEL_HOST_UID, LABEL_NAME
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.providers.fake import FakeProvider
from host_client.runtime_dir import RuntimeDir
from tests.docker.sandboxes import engine, image, leaks, provider, run_host, runtime, settings

__all__ = ["engine", "image", "provider", "runtime", "settings"]


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as box:
        yield box


class NotingProvider(FakeProvider):
    """Notes the interpreters that a test leaves open; collected at random, they would ask a broker in their thread."""

    def __init__(self, broker: InProcessBroker) -> None:
        super().__init__(broker)
        self.opened: list[SandboxInterpreter] = []


@pytest.fixture
def fake(broker: InProcessBroker) -> Iterator[NotingProvider]:
    made = NotingProvider(broker)
    yield made
    for interpreter in made.opened:
        interpreter.shutdown()


def opened(fake: NotingProvider, **keywords: Any) -> SandboxInterpreter:
    interpreter = SandboxInterpreter(provider=fake, **keywords)
    interpreter.start()
    fake.opened.append(interpreter)
    return interpreter


@pytest.mark.parametrize("address", ["novel", "in-process/novel", "id", "in-process/id", "in-process"])
def test_a_session_is_found_by_its_name_its_id_or_its_sandbox(fake: NotingProvider, address: str) -> None:
    older = opened(fake, session="novel")
    older.execute("x = 41")
    with SandboxInterpreter.attach(address.replace("id", older.session_id or ""), provider=fake) as newer:
        assert newer.session_id == older.session_id
        assert newer.execute("x + 1") == 42


def test_a_factory_attaches_too(fake: NotingProvider) -> None:
    older = opened(fake, session="novel")
    older.execute("x = 41")
    with SandboxInterpreter.factory(attach="novel", provider=fake)() as newer:
        assert newer.execute("x + 1") == 42


def test_what_is_not_there_cannot_be_attached_to(fake: NotingProvider) -> None:
    with pytest.raises(UnknownSession, match="no session 'novel'"):
        SandboxInterpreter.attach("novel", provider=fake)


def test_what_could_mean_several_names_them(fake: NotingProvider) -> None:
    several = pytest.raises(UnknownSession, match="in-process/one, in-process/two")
    with opened(fake, session="one"), opened(fake, session="two"), several:
        SandboxInterpreter.attach("in-process", provider=fake)


@pytest.mark.parametrize(
    "keywords", [{"attach": ""}, {"attach": "a", "session": "b"}, {"attach": "a", "sandbox": "b"}, {"session": "a b"}]
)
def test_keywords_that_contradict_each_other_are_refused_at_once(keywords: dict[str, str]) -> None:
    for make in (SandboxInterpreter, SandboxInterpreter.factory):
        with pytest.raises(BadSetting):
            make(**keywords)  # type: ignore[arg-type]


def test_the_older_client_is_fenced_says_so_at_once_from_then_on_and_ends_nothing(fake: NotingProvider) -> None:
    older = opened(fake, session="novel")
    older.execute("x = 1")
    with SandboxInterpreter.attach("novel", provider=fake) as newer:
        for _ in range(2):
            with pytest.raises(SessionLost) as lost:
                older.execute("x = 2")
            assert lost.value.reason == "fenced"
        older.shutdown()
        assert newer.execute("x") == 1


def test_of_two_clients_that_attach_in_turn_the_last_one_holds_it(fake: NotingProvider) -> None:
    first = opened(fake, session="novel")
    first.execute("x = 1")
    second = SandboxInterpreter.attach("novel", provider=fake)
    fake.opened.append(second)
    with SandboxInterpreter.attach("novel", provider=fake) as third:
        with pytest.raises(SessionLost):
            second.execute("x")
        assert third.execute("x") == 1


def test_somebody_else_attaching_at_the_same_moment_is_told(
    fake: NotingProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = opened(fake, session="novel")
    attach = HttpBrokerClient.attach

    def raced(self: HttpBrokerClient, session_id: str, epoch: int) -> Any:
        monkeypatch.setattr(HttpBrokerClient, "attach", attach)
        fake.opened.append(SandboxInterpreter.attach("novel", provider=fake))
        return attach(self, session_id, epoch)

    monkeypatch.setattr(HttpBrokerClient, "attach", raced)
    with pytest.raises(Fenced):
        SandboxInterpreter.attach("novel", provider=fake)
    assert fake.opened[1].session_id == older.session_id


def test_a_new_execution_first_carries_the_old_one_to_its_end(fake: NotingProvider) -> None:
    entered, release = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        release.wait()
        return "late"

    older = opened(fake, session="novel", tools={"slow": slow}, idempotent=["slow"])
    errors: list[BaseException] = []

    def run() -> None:
        try:
            older.execute("print('begun'); answer = slow()")
        except SandboxError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    entered.wait()
    with SandboxInterpreter.attach(
        "novel", provider=fake, tools={"slow": lambda: "again"}, idempotent=["slow"]
    ) as newer:
        assert newer.execute("answer") == "again"
        assert newer.resumed_result is not None
        assert newer.resumed_result.output == "begun\n"
    thread.join()
    release.set()
    assert isinstance(errors[0], SessionLost)


def test_a_tool_reads_the_same_key_at_each_attempt(fake: NotingProvider) -> None:
    seen: list[tuple[str, int]] = []
    finished = threading.Event()

    @tool(idempotent=True)
    def effect() -> str:
        call = current_call()
        assert call is not None
        seen.append((call.key, call.attempt))
        if len(seen) == 1:  # the first host vanishes in the middle: somebody else goes on
            newer = SandboxInterpreter.attach("novel", provider=fake, tools={"effect": effect})
            newer.resume()
            newer.shutdown()
            finished.set()
        return "done"

    older = opened(fake, session="novel", tools={"effect": effect})
    with pytest.raises(SessionLost):
        older.execute("effect()")
    assert finished.wait(30)
    (first, one), (second, two) = seen
    assert (first, one, two) == (second, 1, 2)
    assert current_call() is None


# On a real engine.

KILLED_HOST = """
from host_client import SandboxInterpreter
def effect():
    print(interpreter.session_id, interpreter.sandbox_handle.sandbox_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
interpreter = SandboxInterpreter(provider=provider, settings=settings, session=NAME, tools={"effect": effect})
interpreter.execute('''
x = 41
try: effect()
except Exception as error: seen = type(error).__name__
''')
"""


def killed_host(image: str, name: str | None) -> tuple[str, str]:
    """Let a host die in the middle of a tool; return the ids of its session and its sandbox."""
    host = run_host(KILLED_HOST.replace("NAME", repr(name)), image)
    printed, errors = host.communicate(timeout=60)
    assert host.returncode == -signal.SIGKILL, errors
    session_id, sandbox_id = printed.split()
    return session_id, sandbox_id


@pytest.mark.docker
def test_an_owned_sandbox_goes_on_after_its_host_was_killed_and_ends_with_its_new_one(
    image: str, provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    session_id, _ = killed_host(image, None)
    newer = SandboxInterpreter.attach(session_id, provider=provider, settings=settings)
    newer.resume()
    assert newer.execute("x + 1, seen") == [42, "ToolOutcomeUnknown"]
    provider.stop(DockerProvider().start(settings))  # another process's start reaps; this one has a host again
    assert newer.execute("x") == 41
    newer.shutdown()
    assert leaks(engine, runtime) == []


@pytest.mark.docker
def test_a_named_session_is_spared_by_the_reaper_and_one_without_a_name_is_not(
    image: str, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    _, named = killed_host(image, "novel")
    _, unnamed = killed_host(image, None)
    fresh = DockerProvider()
    fresh.stop(fresh.start(settings))
    left = leaks(engine, runtime)
    assert named in left
    assert unnamed not in left
    with SandboxInterpreter.attach("novel", provider=fresh, settings=settings) as newer:
        assert newer.execute("x") == 41
    assert leaks(engine, runtime) == []


@pytest.mark.docker
def test_another_users_sandbox_is_refused_by_its_name(
    provider: DockerProvider, settings: SandboxSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = DockerEngine.list

    def foreign(self: DockerEngine, labels: Any) -> list[dict[str, Any]]:
        theirs = {LABEL_NAME: "theirs", LABEL_HOST_UID: str(os.geteuid() + 1)}
        return [*listed(self, labels), {"Id": "1", "State": "running", "Labels": theirs}]

    with monkeypatch.context() as patched:
        patched.setattr(DockerEngine, "list", foreign)
        for address in ("theirs", "theirs/novel"):
            with pytest.raises(ForeignSession):
                SandboxInterpreter.attach(address, provider=provider, settings=settings)
