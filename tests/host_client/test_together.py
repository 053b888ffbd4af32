"""Claims about small requests that travel together: each gets its own reply, and nothing gets lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import pytest

from host_client.errors import BrokerUnreachable
from host_client.http_wire import BadReply, ConnectionEnded
from host_client.together import Together


class Gate:
    """An exchange that the test lets through: one message comes back as its upper case."""

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.refuses = False

    def __call__(self, messages: Sequence[bytes], timeout_s: float) -> list[bytes] | None:
        self.batches.append(list(messages))
        self.entered.set()
        assert self.go_on.wait(20)
        if self.error is not None:
            raise self.error
        return None if self.refuses else [each.upper() for each in messages]


def send_all(together: Together[bytes], gate: Gate, count: int) -> dict[bytes, bytes | Exception | None]:
    """Send one message whose exchange waits until ``count`` more have gathered behind it."""
    outcomes: dict[bytes, bytes | Exception | None] = {}

    def work(message: bytes) -> None:
        try:
            outcomes[message] = together.send(message, 5.0)
        except Exception as error:
            outcomes[message] = error

    threads = [threading.Thread(target=work, args=(f"m{number}".encode(),)) for number in range(count + 1)]
    threads[0].start()
    assert gate.entered.wait(20)
    for thread in threads[1:]:
        thread.start()
    give_up_at = time.monotonic() + 20
    while together._batches.waiting < count and time.monotonic() < give_up_at:
        os.sched_yield()
    gate.go_on.set()
    for thread in threads:
        thread.join(20)
    return outcomes


def test_a_lone_message_goes_at_once() -> None:
    gate = Gate()
    gate.go_on.set()
    assert Together(gate).send(b"a", 5.0) == b"A"
    assert gate.batches == [[b"a"]]


def test_what_gathers_meanwhile_goes_together_and_each_gets_its_own_reply() -> None:
    gate = Gate()
    outcomes = send_all(Together(gate), gate, 40)
    assert outcomes == {f"m{number}".encode(): f"M{number}".encode() for number in range(41)}
    assert sorted(map(len, gate.batches)) == [1, 8, 16, 16]


def test_where_nothing_can_be_done_together_everybody_is_told() -> None:
    gate = Gate()
    gate.refuses = True
    assert set(send_all(Together(gate), gate, 3).values()) == {None}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TimeoutError("no answer in time"), TimeoutError),
        (BadReply("bytes after the reply"), BadReply),
        (ConnectionEnded(clean=False), ConnectionError),
        (BrokerUnreachable("nothing listens"), BrokerUnreachable),
    ],
)
def test_a_failure_is_everybodys_and_keeps_its_meaning(error: Exception, kind: type[Exception]) -> None:
    gate = Gate()
    gate.error = error
    outcomes = send_all(Together(gate), gate, 3)
    assert len(outcomes) == 4
    for outcome in outcomes.values():
        assert isinstance(outcome, kind)
        assert str(outcome) == str(error)


def test_an_interrupt_of_the_sending_thread_leaves_nobody_waiting() -> None:
    gate = Gate()
    gate.error = KeyboardInterrupt()
    together = Together(gate)
    first: list[BaseException] = []

    def press() -> None:
        try:
            together.send(b"mine", 5.0)
        except BaseException as error:
            first.append(error)

    thread = threading.Thread(target=press)
    thread.start()
    assert gate.entered.wait(20)
    gate.go_on.set()
    thread.join(20)
    assert isinstance(first[0], KeyboardInterrupt)
    gate.error = None
    assert together.send(b"next", 5.0) == b"NEXT"
