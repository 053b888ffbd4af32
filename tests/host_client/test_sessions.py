"""Named sessions from several programs: created and left, attached to, listed, closed; on a broker in this process."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from broker.protocol.messages import ClaimRequest, HeldBy
from broker.testing import InProcessBroker
from host_client import (
    SandboxInterpreter,
    SandboxSettings,
    SessionBusy,
    SessionLost,
    SessionNameTaken,
    SessionStatus,
    close_session,
    list_sessions,
    program,
)
from host_client.broker_client import HttpBrokerClient
from host_client.errors import BadSetting, Fenced, UnknownSandbox, UnknownSession
from host_client.owner import Owner
from host_client.program import this_program
from host_client.providers.fake import FakeProvider

SETTINGS = SandboxSettings(journal=":memory:", history=False)
BOX = "in-process"
WAIT = ClaimRequest(limit=0, wait_s=20)


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as box:
        yield box


@pytest.fixture
def provider(broker: InProcessBroker) -> FakeProvider:
    return FakeProvider(broker)


def create(provider: FakeProvider, name: str = "novel", **keywords: Any) -> SandboxInterpreter:
    return SandboxInterpreter.create(name, sandbox=BOX, provider=provider, **{"settings": SETTINGS, **keywords})


def attach(provider: FakeProvider, name: str = "novel", **keywords: Any) -> SandboxInterpreter:
    return SandboxInterpreter.attach(name, provider=provider, settings=SETTINGS, **keywords)


def the_session(provider: FakeProvider) -> SessionStatus:
    [session] = list_sessions(provider=provider)
    return session


def test_one_creates_and_leaves_it_another_goes_on_a_third_closes_it(provider: FakeProvider) -> None:
    with create(provider) as first:
        first.execute("x = 41")
    left = the_session(provider)
    assert (left.name, left.state, left.holder, left.kept) == ("novel", "idle", None, True)
    with attach(provider) as second:
        assert second.execute("x + 1") == 42
        held = the_session(provider)
        assert (held.session_id, held.executions, held.holder_gone) == (left.session_id, 2, False)
        assert (held.holder, held.holder_pid) == (this_program().program, this_program().pid)
    assert the_session(provider).holder is None
    closed = close_session("novel", provider=provider)
    assert (closed.session_id, closed.executions) == (left.session_id, 2)
    assert list_sessions(provider=provider) == []


def test_a_factory_keeps_one_session_over_its_interpreters(provider: FakeProvider) -> None:
    create(provider).shutdown()
    factory = SandboxInterpreter.factory(attach="novel", provider=provider, settings=SETTINGS)
    for _ in range(3):
        with factory() as interpreter:
            interpreter.execute("n = globals().get('n', 0) + 1")
    with factory() as interpreter:
        assert interpreter.execute("n") == 3


def test_an_ordinary_session_ends_with_its_interpreter_as_ever(provider: FakeProvider) -> None:
    with SandboxInterpreter(sandbox=BOX, session="novel", provider=provider, settings=SETTINGS) as ordinary:
        assert not the_session(provider).kept
        ordinary.execute("x = 1")
    assert list_sessions(provider=provider) == []


def test_an_interpreter_that_is_forgotten_leaves_its_session(provider: FakeProvider) -> None:
    interpreter = create(provider)
    interpreter.execute("x = 1")
    del interpreter
    assert (the_session(provider).state, the_session(provider).holder) == ("idle", None)


def test_what_runs_goes_on_when_its_program_lets_go(provider: FakeProvider) -> None:
    entered, release = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        release.wait(30)
        return "first"

    first = create(provider, tools={"slow": slow}, idempotent=["slow"])
    raised: list[SessionLost] = []

    def run() -> None:
        with pytest.raises(SessionLost) as lost:
            first.execute("answer = slow()")
        raised.append(lost.value)

    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(30)
    first.shutdown()
    thread.join(30)
    release.set()
    assert raised[0].reason == "shutdown"
    assert (the_session(provider).state, the_session(provider).holder) == ("running", None)
    with attach(provider, tools={"slow": lambda: "second"}, idempotent=["slow"]) as second:
        second.resume()
        assert second.execute("answer") == "second"


# Errors.


def test_a_name_that_is_taken_says_who_holds_it(provider: FakeProvider) -> None:
    with create(provider), pytest.raises(SessionNameTaken, match=rf"'novel'.*\(process {this_program().pid}\)"):
        create(provider)
    with pytest.raises(SessionNameTaken, match="held by nobody"):
        create(provider)


def test_a_name_that_is_not_there_lists_those_that_are(provider: FakeProvider) -> None:
    with pytest.raises(UnknownSession, match="no session 'novle'; there are none"):
        attach(provider, "novle")
    create(provider).shutdown()
    create(provider, "other").shutdown()
    for act in (attach, lambda provider, name: close_session(name, provider=provider)):
        with pytest.raises(UnknownSession, match="no session 'novle'; there are in-process/novel, in-process/other"):
            act(provider, "novle")


def test_the_sandbox_must_be_there(provider: FakeProvider) -> None:
    with pytest.raises(UnknownSandbox, match="missing"):
        SandboxInterpreter.create("novel", sandbox="missing", provider=provider, settings=SETTINGS)
    with pytest.raises(UnknownSandbox, match="missing"):
        list_sessions("missing", provider=provider)


@pytest.mark.parametrize(
    "keywords",
    [
        {"keep": True},
        {"keep": True, "session": "novel"},
        {"keep": True, "sandbox": "default"},
        {"keep": True, "attach": "novel"},
        {"keep": "yes", "session": "novel", "sandbox": "default"},
    ],
)
def test_what_cannot_be_kept_is_refused_at_once(keywords: dict[str, Any]) -> None:
    for make in (SandboxInterpreter, SandboxInterpreter.factory):
        with pytest.raises(BadSetting, match="keep"):
            make(**keywords)


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"name": "two words"}, "session"),
        ({"name": ""}, "session"),
        ({"sandbox": ""}, "sandbox"),
        ({"sandbox": None}, "sandbox"),
        ({"settings": "1g", "ttl_s": 60}, "settings"),
        ({"attach": "novel"}, "attach"),
    ],
)
def test_what_cannot_be_created_is_refused_by_name(
    provider: FakeProvider, keywords: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadSetting, match=named):
        SandboxInterpreter.create(**{"name": "novel", "sandbox": BOX, "provider": provider, **keywords})
    assert list_sessions(provider=provider) == []


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_session_without_a_name_cannot_be_closed(provider: FakeProvider, name: Any) -> None:
    with pytest.raises(BadSetting, match="name or id"):
        close_session(name, provider=provider)


@pytest.mark.parametrize("force", [False, True])
def test_a_session_in_which_somebody_executes_is_closed_by_force_alone(provider: FakeProvider, force: bool) -> None:
    refused: list[str] = []
    over = threading.Event()

    def end_it() -> None:
        try:
            close_session("novel", force=force, provider=provider)
        except SessionBusy as error:
            refused.append(str(error))
        over.set()

    with create(provider, tools={"end_it": end_it}) as interpreter:
        if force:
            with pytest.raises(SessionLost):
                interpreter.execute("end_it()")
            assert over.wait(30)
            assert list_sessions(provider=provider) == []
        else:
            assert interpreter.execute("end_it(); 'alive'") == "alive"
            assert f"{this_program()} holds" in refused[0]
            assert "--force" in refused[0]


def test_whoever_holds_a_session_that_was_closed_is_told(provider: FakeProvider) -> None:
    with create(provider) as interpreter:
        interpreter.execute("x = 1")
        close_session("novel", provider=provider)
        with pytest.raises(SessionLost) as lost:
            interpreter.execute("x")
        assert lost.value.reason == "removed"


def test_of_two_that_attach_the_one_that_comes_first_is_fenced(provider: FakeProvider) -> None:
    create(provider).shutdown()
    first = attach(provider)
    with attach(provider) as second:
        with pytest.raises(SessionLost) as lost:
            first.execute("1")
        assert lost.value.reason == "fenced"
        first.shutdown()  # does not let go of what is the second one's
        assert the_session(provider).holder is not None
        second.execute("1")


@pytest.mark.parametrize("force", [False, True])
def test_somebody_who_attaches_while_it_is_closed_wins_unless_forced(
    provider: FakeProvider, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    create(provider).shutdown()
    close, newcomers = HttpBrokerClient.close_session, []

    def raced(self: HttpBrokerClient, *args: Any, **keywords: Any) -> None:
        monkeypatch.setattr(HttpBrokerClient, "close_session", close)
        newcomers.append(attach(provider))
        close(self, *args, **keywords)

    monkeypatch.setattr(HttpBrokerClient, "close_session", raced)
    if force:
        close_session("novel", force=True, provider=provider)
        assert list_sessions(provider=provider) == []
    else:
        with pytest.raises(Fenced):
            close_session("novel", provider=provider)
        assert newcomers[0].execute("1") == 1
    newcomers[0].shutdown()


# Time to live.


def test_a_session_that_expired_says_so_to_its_holder_to_who_attaches_and_in_the_list(provider: FakeProvider) -> None:
    holder = create(provider, ttl_s=0.1)
    with pytest.raises(SessionLost) as ended:  # a long poll on the session: answered by its end
        holder._session.client.claim(holder.session_id, WAIT)  # type: ignore[union-attr, arg-type]
    assert ended.value.reason == "expired"
    for act in (lambda: holder.execute("1"), lambda: attach(provider)):
        with pytest.raises(SessionLost) as lost:
            act()
        assert lost.value.reason == "expired"
    status = the_session(provider)
    assert (status.state, status.lost, status.ttl_s, status.ends_in_s) == ("lost", "expired", 0.1, None)
    with create(provider) as again:  # its name is free
        assert again.execute("1") == 1
    for _ in range(2):  # the living one first
        close_session("novel", provider=provider)
    assert list_sessions(provider=provider) == []


def test_the_setting_is_for_sessions_in_named_sandboxes(provider: FakeProvider) -> None:
    settings = dataclasses.replace(SETTINGS, session_ttl_s=7200)
    with SandboxInterpreter(provider=provider, settings=settings):
        assert the_session(provider).ttl_s is None
    with SandboxInterpreter(provider=provider, settings=settings, sandbox=BOX):
        status = the_session(provider)
        assert status.ttl_s == 7200
        assert status.ends_in_s is not None
        assert 7000 < status.ends_in_s <= 7200
    with create(provider, settings=settings, ttl_s=60):
        assert the_session(provider).ttl_s == 60


@pytest.mark.parametrize("ttl_s", [0, -5, 0.01, 1e15, math.nan, "60", True])
def test_a_time_to_live_that_cannot_work_is_a_bad_setting(provider: FakeProvider, ttl_s: Any) -> None:
    with pytest.raises(BadSetting, match="session_ttl_s"):
        create(provider, ttl_s=ttl_s)


def test_the_setting_is_read_from_the_environment() -> None:
    assert SandboxSettings.from_environment({"RLM_SANDBOX_SESSION_TTL_S": "90"}).session_ttl_s == 90


# What the list shows.


def test_a_list_has_the_memory_and_is_sorted_by_sandbox_and_name(provider: FakeProvider) -> None:
    with create(provider, "b"), create(provider, "a") as big:
        before = list_sessions(provider=provider)[0].memory_bytes
        big.execute("kept = bytearray(32 << 20); kept[::4096] = b'x' * len(kept[::4096])")
        first, second = list_sessions(BOX, provider=provider)
        assert (first.name, second.name) == ("a", "b")
        assert None not in (before, first.memory_bytes)
        assert (first.memory_bytes or 0) - (before or 0) >= 32 << 20
    for name in "ab":
        close_session(name, sandbox=BOX, provider=provider)


def test_a_holder_that_was_killed_is_shown_as_gone() -> None:
    here = Owner.current()
    held_by = HeldBy(pid=here.pid, program="a.py", identity=here.label())
    assert not program.is_gone(held_by)
    assert program.is_gone(
        dataclasses.replace(held_by, identity=dataclasses.replace(here, start_ticks=here.start_ticks + 1).label())
    )
    assert not program.is_gone(dataclasses.replace(held_by, identity="nonsense"))


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["/home/me/secret/run.py", "--key", "x"], "run.py"),
        (["-c"], "python"),
        ([""], "python"),
        ([], "python"),
        (["/x/pytest/__main__.py"], "python -m pytest"),
        (["/x/\x1b[31m.py"], "?[31m.py"),
        (["/x/" + "a" * 200], "a" * 100),
    ],
)
def test_a_program_is_named_after_its_script_without_its_folder_and_arguments(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], name: str
) -> None:
    monkeypatch.setattr("sys.argv", argv)
    assert program._name() == name
