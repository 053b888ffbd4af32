"""Claims about brokers that do not keep their word: silent, late, or talking nonsense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from broker.protocol import PROTOCOL_VERSION, limits
from broker.protocol.messages import ClaimRequest, ExecuteRequest, ExecutionResult, Outcome, Progress
from host_client import SandboxInterpreter, SandboxSettings, execution
from host_client.broker_client import HttpBrokerClient, News
from host_client.errors import BrokerError, BrokerUnreachable, MalformedReply, ProtocolMismatch, SessionLost
from host_client.execution import HOST_GUARD_S, Execution
from host_client.providers.base import SandboxHandle
from host_client.scripted_broker import ScriptedBroker, Step
from host_client.transport import BrokerTimeout, Reply

REQUEST = ExecuteRequest(execution_id="e1", code="1", timeout_s=10.0)
STILL_RUNNING = News(Progress(execution_id="e1", running=True), ())


class Clock:
    """Stands in for the ``time`` module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Calls:
    """No tools."""

    busy = False
    ended = False

    def wanted(self, *, wait_s: float) -> ClaimRequest:
        return ClaimRequest(wait_s=wait_s)

    def take(self, news: News) -> None:
        pass

    def end(self) -> None:
        self.ended = True


class StubbornClient:
    """Every long poll lasts as long as asked, and brings nothing."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.waits: list[tuple[float, float]] = []
        self.interrupted = 0

    def execute(
        self, session_id: str, request: Any, blobs: Any, wanted: ClaimRequest, *, late_s: float, on_claims: Any = None
    ) -> News:
        return self.claim(session_id, wanted, late_s=late_s)

    def claim(self, session_id: str, wanted: ClaimRequest, *, late_s: float, on_claims: Any = None) -> News:
        self.waits.append((wanted.wait_s, late_s))
        self.clock.now += wanted.wait_s
        return STILL_RUNNING

    def interrupt(self, session_id: str, execution_id: str) -> None:
        self.interrupted += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(execution, "time", clock)
    return clock


def _run(client: Any, calls: Any, request: ExecuteRequest = REQUEST) -> News:
    return Execution(client, "s1", calls).run(request, ())


def test_a_broker_that_lets_the_deadline_pass_is_not_waited_for(clock: Clock) -> None:
    client, calls = StubbornClient(clock), Calls()
    with pytest.raises(SessionLost) as caught:
        _run(client, calls)
    assert caught.value.reason == "deadline"
    assert clock.now - 1000 == pytest.approx(10 + limits.INTERRUPT_GRACE_S + HOST_GUARD_S)
    assert calls.ended


def test_time_in_tools_does_not_count_where_the_request_says_so(clock: Clock) -> None:
    client, calls = StubbornClient(clock), Calls()
    calls.busy = True
    request = ExecuteRequest(execution_id="e1", code="1", timeout_s=10.0, timeout_includes_tools=False)
    original = client.claim

    def claim(session_id: str, wanted: ClaimRequest, *, late_s: float, on_claims: Any = None) -> News:
        calls.busy = clock.now < 1500
        return original(session_id, wanted, late_s=late_s)

    client.claim = claim  # type: ignore[method-assign]
    with pytest.raises(SessionLost):
        _run(client, calls, request)
    assert clock.now > 1500


def test_without_a_deadline_it_waits_as_long_as_the_broker_answers(clock: Clock) -> None:
    client, calls = StubbornClient(clock), Calls()
    request = ExecuteRequest(execution_id="e1", code="1")
    done = News(Progress(execution_id="e1", running=False, result=ExecutionResult(outcome=Outcome.OK)), ())
    original = client.claim

    def claim(session_id: str, wanted: ClaimRequest, *, late_s: float, on_claims: Any = None) -> News:
        return done if clock.now > 10_000 else original(session_id, wanted, late_s=late_s)

    client.claim = claim  # type: ignore[method-assign]
    assert _run(client, calls, request) is done
    assert all(wait_s <= limits.DEFAULT_LEASE_S / 3 for wait_s, _ in client.waits)


def test_an_interrupt_that_changes_nothing_is_given_up_in_time(clock: Clock) -> None:
    client, calls = StubbornClient(clock), Calls()
    original = client.claim

    def claim(session_id: str, wanted: ClaimRequest, *, late_s: float, on_claims: Any = None) -> News:
        if not client.interrupted:
            raise KeyboardInterrupt
        return original(session_id, wanted, late_s=late_s)

    client.claim = claim  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        _run(client, calls)
    assert client.interrupted == 1
    assert clock.now - 1000 <= limits.INTERRUPT_GRACE_S + HOST_GUARD_S


@pytest.mark.parametrize(
    "progress",
    [
        Progress(execution_id="e1", running=False),
        Progress(execution_id="other", running=False, result=ExecutionResult(outcome=Outcome.OK)),
    ],
)
def test_an_end_without_the_result_of_this_execution_is_malformed(clock: Clock, progress: Progress) -> None:
    client = StubbornClient(clock)
    client.claim = lambda *_, **__: News(progress, ())  # type: ignore[method-assign]
    with pytest.raises(MalformedReply):
        _run(client, Calls())


class OneAnswer:
    """A transport whose broker opens a session and then answers everything in one way."""

    def __init__(self, answer: Callable[[], Reply], health: dict[str, Any] | None = None) -> None:
        self.answer = answer
        self.health = {"protocol": PROTOCOL_VERSION} if health is None else health

    def request(self, method: str, path: str, header: Any = None, blobs: Sequence[Any] = (), **_: Any) -> Reply:
        if path == "/v1/health":
            return Reply(200, self.health, [])
        if path == "/v1/sessions":
            return Reply(201, {"session_id": "s1"}, [])
        return self.answer()

    def close(self) -> None:
        pass


class Provider(ScriptedBroker):
    """Counts starts and stops; its broker is a transport of the test's."""

    def __init__(self, transport: OneAnswer) -> None:
        super().__init__()
        self._transport = transport

    def connect(self, handle: SandboxHandle) -> Any:
        return HttpBrokerClient(self._transport)


def _raises(error: Exception) -> Callable[[], Reply]:
    def answer() -> Reply:
        raise error

    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: Reply(200, {"running": "nonsense"}, []), "protocol"),
        (
            lambda: Reply(
                200,
                Progress(
                    execution_id=None, running=False, result=ExecutionResult(outcome=Outcome.OK, value={"$x": 1})
                ).to_json(),
                [],
            ),
            "protocol",
        ),
        (_raises(MalformedReply("no frame")), "protocol"),
        (_raises(BrokerTimeout("25 s")), "unresponsive"),
        (lambda: Reply(410, {"error": {"code": "session_lost", "message": "m", "reason": "oom"}}, []), "oom"),
        (lambda: Reply(404, {"error": {"code": "unknown_session", "message": "m"}}, []), "removed"),
    ],
)
def test_a_session_that_cannot_go_on_is_lost_and_its_sandbox_killed(answer: Any, reason: str) -> None:
    provider = Provider(OneAnswer(answer))
    interpreter = SandboxInterpreter(provider=provider)
    with pytest.raises(SessionLost) as caught:
        interpreter.execute("1")
    assert caught.value.reason == reason
    assert (provider.started, provider.stopped) == (1, 1)
    assert interpreter.sandbox_handle is None


def test_a_broker_that_hung_up_is_explained_by_the_engine_even_a_moment_later() -> None:
    provider = Provider(OneAnswer(_raises(BrokerUnreachable("closed"))))
    asked: list[None] = []

    def why_dead(handle: SandboxHandle) -> str | None:
        asked.append(None)
        return "oom" if len(asked) == 3 else None

    provider.why_dead = why_dead  # type: ignore[method-assign]
    with pytest.raises(SessionLost) as caught:
        SandboxInterpreter(provider=provider).execute("1")
    assert caught.value.reason == "oom"


def test_a_request_that_is_refused_costs_no_session() -> None:
    refusal = Reply(413, {"error": {"code": "payload_too_large", "message": "too much"}}, [])
    provider = Provider(OneAnswer(lambda: refusal))
    interpreter = SandboxInterpreter(provider=provider)
    with pytest.raises(BrokerError, match="too much") as caught:
        interpreter.execute("1")
    assert caught.value.status == 413
    assert provider.stopped == 0
    interpreter.shutdown()


def test_an_image_of_another_version_leaves_nothing_running() -> None:
    provider = Provider(OneAnswer(lambda: Reply(200, {}, []), health={"protocol": 99}))
    with pytest.raises(ProtocolMismatch, match="99"):
        SandboxInterpreter(provider=provider).start()
    assert (provider.started, provider.stopped) == (1, 1)


def test_a_sandbox_that_dies_while_it_starts_says_why() -> None:
    class Dead(OneAnswer):
        def request(self, *args: Any, **keywords: Any) -> Reply:
            raise BrokerUnreachable("closed")

    provider = Provider(Dead(lambda: Reply(200, {}, [])))
    provider.death = "oom"
    with pytest.raises(SessionLost) as caught:
        SandboxInterpreter(provider=provider).start()
    assert caught.value.reason == "oom"
    assert provider.stopped == 1


def test_a_named_sandbox_is_not_killed_for_the_sake_of_one_session(tmp_path: Path) -> None:
    provider = Provider(OneAnswer(_raises(MalformedReply("no frame"))))
    with pytest.raises(SessionLost):
        SandboxInterpreter(provider=provider, sandbox="scripted").execute("1")
    assert provider.stopped == 0


def test_the_scripted_broker_takes_no_step_for_dspys_own_set_up() -> None:
    interpreter = SandboxInterpreter(provider=ScriptedBroker([Step(value=1)]), settings=SandboxSettings())
    assert interpreter.execute("def _dspy_make_ctor(kind): ...") is None
    assert interpreter.execute("1") == 1
    interpreter.shutdown()
