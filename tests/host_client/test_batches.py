"""Claims about batches: everything is done once, nobody waits for ever, whatever strikes whoever does it."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter

import pytest

from host_client.batches import Batches


class Doing:
    """Does batches when the test lets it, and notes them."""

    def __init__(self, most: int | None = None) -> None:
        self.done: list[list[int]] = []
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.batches: Batches[int] = Batches(self.do, most)
        self.errors: list[BaseException] = []

    def do(self, items: list[int]) -> None:
        self.done.append(items)
        self.entered.set()
        assert self.go_on.wait(20)
        error, self.error = self.error, None
        if error is not None:
            raise error

    def join(self, item: int) -> None:
        try:
            self.batches.join(item)
        except BaseException as error:
            self.errors.append(error)

    def started(self, *items: int) -> list[threading.Thread]:
        """Start a thread for each; the first one is within ``do`` when this returns, the others wait behind it."""
        threads = [threading.Thread(target=self.join, args=(item,), daemon=True) for item in items]
        for number, thread in enumerate(threads):
            thread.start()
            self._until(lambda number=number: self.entered.is_set() and self.batches.waiting == number)  # type: ignore[misc]
        return threads

    @staticmethod
    def _until(true: object) -> None:
        give_up_at = time.monotonic() + 20
        while not true():  # type: ignore[operator]
            assert time.monotonic() < give_up_at
            os.sched_yield()

    def finish(self, threads: list[threading.Thread]) -> None:
        self.go_on.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


def test_what_gathers_is_done_in_its_order_by_one_of_those_who_wait() -> None:
    doing = Doing()
    doing.finish(doing.started(*range(20)))
    assert doing.done == [[0], [*range(1, 20)]]


def test_a_batch_has_no_more_than_it_may() -> None:
    doing = Doing(most=8)
    doing.finish(doing.started(*range(20)))
    assert doing.done == [[0], [*range(1, 9)], [*range(9, 17)], [17, 18, 19]]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_strikes_who_did_it_and_leaves_nobody_waiting(error: BaseException) -> None:
    doing = Doing()
    doing.error = error
    doing.finish(doing.started(1, 2, 3))
    assert doing.errors == [error]
    assert doing.done == [[1], [2, 3]]


def test_whoever_is_interrupted_while_it_waits_takes_its_item_back() -> None:
    doing = Doing()
    threads = doing.started(1, 2, 3)
    seat = doing.batches._waiting[0]
    assert seat.item == 2
    doing.batches._leave(seat)  # what its ``finally`` does
    seat.done = True
    seat.wake()
    doing.finish(threads)
    assert doing.done == [[1], [3]]


def test_whoever_is_interrupted_when_its_turn_has_come_passes_it_on() -> None:
    doing = Doing()
    batches = doing.batches

    class Struck(KeyboardInterrupt):
        pass

    lead = batches._lead

    def struck() -> None:
        batches._lead = lead  # type: ignore[method-assign]
        raise Struck

    threads = doing.started(1, 2, 3)
    batches._lead = struck  # type: ignore[method-assign]
    doing.finish(threads)
    assert [type(error) for error in doing.errors] == [Struck]
    assert doing.done == [[1], [3]]


def test_from_within_it_is_done_at_once_and_alone() -> None:
    seen: list[list[int]] = []

    def do(items: list[int]) -> None:
        seen.append(items)
        if items == [1]:
            batches.join(2)

    batches: Batches[int] = Batches(do)
    batches.join(1)
    batches.join(3)
    assert seen == [[1], [2], [3]]


def test_a_forked_child_waits_for_nobody() -> None:
    doing = Doing()
    threads = doing.started(1, 2)
    child = os.fork()
    if child == 0:
        try:
            doing.go_on.set()
            doing.batches.join(5)
        finally:
            os._exit(0 if doing.done == [[1], [5]] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    doing.finish(threads)
    assert doing.done == [[1], [2]]


def test_a_thousand_changes_of_many_threads_are_done_once_each() -> None:
    counted: Counter[int] = Counter()
    batches: Batches[int] = Batches(counted.update, 7)
    threads = [
        threading.Thread(target=lambda first=first: [batches.join(first + n) for n in range(50)])  # type: ignore[misc]
        for first in range(0, 1_000, 50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert counted == Counter(range(1_000))
