"""Claims about answers that come late, are refused, or cannot be made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from broker.protocol import limits
from broker.protocol.messages import Claim, ClaimRequest, ErrorInfo, Progress, ToolResult
from host_client.broker_client import News
from host_client.call_recorder import CallRecorder
from host_client.errors import BrokerError, BrokerUnreachable, CallGone, LeaseExpired, SandboxError
from host_client.journal import Holder
from host_client.memory_journal import MemoryJournal
from host_client.tool_runner import POLL_S, ToolCalls, public_error
from host_client.tool_threads import ToolThreads

WAIT_S = 10


class Client:
    """Notes answers, and refuses the first ones with what the test says."""

    def __init__(self, *refusals: SandboxError) -> None:
        self.refusals = list(refusals)
        self.answers: list[ToolResult] = []
        self.claims: list[ClaimRequest] = []
        self.interrupts = 0
        self.answered = threading.Semaphore(0)
        self.on_claim: Callable[[], News] = lambda: News(Progress(execution_id="e1", running=False), ())

    def answer(self, call_id: str, result: ToolResult, blobs: Sequence[Any], *, claim: bool = False) -> None:
        self.answers.append(result)
        try:
            if self.refusals:
                raise self.refusals.pop(0)
        finally:
            self.answered.release()

    def claim(self, session_id: str, wanted: ClaimRequest, *, late_s: float = 0.0, on_claims: Any = None) -> News:
        self.claims.append(wanted)
        return self.on_claim()

    def interrupt(self, session_id: str, execution_id: str) -> None:
        self.interrupts += 1
        raise BrokerError("the execution has ended", status=404)

    def wait_for_answers(self, count: int) -> list[ToolResult]:
        for _ in range(count):
            assert self.answered.acquire(timeout=WAIT_S)
        return self.answers


def _claim(tool: str = "tool", *args: Any, call_id: str = "c1") -> Claim:
    return Claim(call_id=call_id, attempt=1, tool=tool, args=list(args), kwargs={}, execution_id="e1", lease_s=60)


def _news(*claims: Claim) -> News:
    return News(Progress(execution_id="e1", running=True, claims=claims), ())


def _calls(client: Client, tool: Callable[..., Any], slots: int = 4) -> ToolCalls:
    return ToolCalls(
        client=client,  # type: ignore[arg-type]
        session_id="s1",
        execution_id="e1",
        invoke=lambda name, args, kwargs: tool(*args, **kwargs),
        threads=ToolThreads(),
        slots=slots,
        recorder=CallRecorder(MemoryJournal(), Holder(sandbox_id="b1", session_id="s1", epoch=1)),
    )


@pytest.mark.parametrize(
    "late", [CallGone("gone", status=410), LeaseExpired("late", status=409), BrokerUnreachable("x")]
)
def test_an_answer_that_comes_too_late_is_nobodys_error(late: SandboxError, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = Client(late)
    _calls(client, lambda: 1).take(_news(_claim()))
    assert [answer.value for answer in client.wait_for_answers(1)] == [1]
    assert caplog.text == ""


def test_a_refused_result_fails_the_call_instead_of_leaving_it_open() -> None:
    client = Client(BrokerError("413", status=413))
    _calls(client, lambda: 1).take(_news(_claim()))
    _, second = client.wait_for_answers(2)
    assert second.error is not None
    assert second.error.type == "RuntimeError"
    assert "413" in second.error.message


def test_a_refused_refusal_is_left_at_that() -> None:
    client = Client(BrokerError("no", status=400), BrokerError("no", status=400))
    calls = _calls(client, lambda: 1)
    calls.take(_news(_claim()))
    assert len(client.wait_for_answers(2)) == 2


def test_malformed_arguments_fail_the_call_and_the_tool_does_not_run() -> None:
    client, ran = Client(), []
    _calls(client, lambda value: ran.append(value)).take(_news(_claim("tool", {"$nonsense": 1})))
    [answer] = client.wait_for_answers(1)
    assert answer.error is not None
    assert answer.error.type == "ValueError"
    assert ran == []


def test_a_result_beyond_the_limit_fails_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_TOOL_CALL_BYTES", 10_000)
    client = Client()
    _calls(client, lambda: "x" * 10_001).take(_news(_claim()))
    [answer] = client.wait_for_answers(1)
    assert answer.error is not None
    assert "10,001 bytes" in answer.error.message


def test_after_the_end_answers_are_kept_back() -> None:
    client, release, done = Client(), threading.Event(), threading.Event()

    def hang() -> None:
        release.wait(WAIT_S)
        done.set()

    calls = _calls(client, hang)
    calls.take(_news(_claim()))
    calls.end()
    release.set()
    assert done.wait(WAIT_S)
    assert client.answers == []


def test_a_tool_that_says_stop_is_remembered_even_if_the_broker_refuses_the_interrupt() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    client = Client()
    calls = _calls(client, stop)
    calls.take(_news(_claim()))
    client.wait_for_answers(1)
    assert isinstance(calls.fatal, KeyboardInterrupt)
    assert client.interrupts == 1


def test_held_claims_are_renewed_with_each_request_in_good_time() -> None:
    release = threading.Event()
    calls = _calls(Client(), lambda: release.wait(WAIT_S))
    assert calls.wanted(wait_s=1).renew == ()
    calls.take(_news(_claim(call_id="a"), _claim(call_id="b")))
    wanted = calls.wanted(wait_s=1)
    assert wanted.renew == (("a", 1), ("b", 1))
    assert wanted.limit == 2
    assert wanted.start
    assert wanted.lease_s / 3 >= POLL_S
    release.set()


def test_when_all_slots_were_taken_the_first_free_thread_claims_until_the_end() -> None:
    release = threading.Event()
    client = Client()
    rounds = iter([_news(_claim(call_id="late")), News(Progress(execution_id="e1", running=False), ())])
    client.on_claim = lambda: next(rounds)
    calls = _calls(client, lambda: release.wait(WAIT_S), slots=1)
    calls.take(_news(_claim(call_id="first")))
    assert calls.wanted(wait_s=1).limit == 0
    release.set()
    assert [answer.error for answer in client.wait_for_answers(2)] == [None, None]
    assert client.claims[0].limit == 1


def test_the_waiting_thread_claims_nothing_while_another_one_does() -> None:
    release, claiming, finish = threading.Event(), threading.Event(), threading.Event()
    client = Client()

    def claim() -> News:
        claiming.set()
        assert finish.wait(WAIT_S)
        raise BrokerUnreachable("closed")

    client.on_claim = claim
    calls = _calls(client, lambda: release.wait(WAIT_S), slots=1)
    calls.take(_news(_claim()))
    release.set()
    assert claiming.wait(WAIT_S)
    assert calls.wanted(wait_s=1).limit == 0
    finish.set()


class Rude(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("bad"), ("ValueError", "bad")),
        (KeyError("k"), ("KeyError", "'k'")),
        (SandboxError("own"), ("SandboxError", "own")),
        (Rude(), ("Rude", "")),
    ],
)
def test_an_error_goes_in_as_name_and_text(error: Exception, expected: tuple[str, str]) -> None:
    told = public_error(error)
    assert (told.type, told.message) == expected
    assert told == ErrorInfo(type=expected[0], message=expected[1])
