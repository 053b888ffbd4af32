"""Who gets which place, what is started and what is ended, decided without threads and on a clock that stands still."""

from __future__ import annotations

from typing import Any

import pytest

from host_client.errors import BadSetting, EngineUnavailable, PoolSessionBusy, PoolSessionGone
from host_client.pool_book import BACKOFF_S, REFILL_DELAY_S, PoolBook, Wish
from host_client.pool_config import PoolConfig
from host_client.pool_place import Place, PlaceState


class Pool:
    """A book, and what a pool would do with its decisions."""

    def __init__(self, **config: Any) -> None:
        self.now_s = 100.0
        self.book: PoolBook[str] = PoolBook(PoolConfig(name="p", **config), self.now_s)
        self.number = 0

    def start(self) -> list[Place[str]]:
        """Begin the starts that are decided."""
        begun = []
        for _ in range(self.book.to_start(self.now_s)):
            self.number += 1
            begun.append(Place[str](self.number, self.now_s))
            self.book.places.append(begun[-1])
        return begun

    def warm(self) -> list[Place[str]]:
        """Carry the starts that are decided to their end."""
        begun = self.start()
        for place in begun:
            self.book.started(place, f"sandbox {place.number}", self.now_s)
        self.book.match(self.now_s)
        return begun

    def ask(self, session: str | None = None, *, overflow: bool = False, held: str | None = None) -> Wish:
        held_sessions = frozenset({held} if held else ())
        wish = Wish(session, f"who wants {session}", self.now_s, overflow, held_sessions)
        self.book.waiting.append(wish)
        self.book.match(self.now_s)
        return wish

    def get(self, session: str | None = None) -> Place[str]:
        wish = self.ask(session)
        if wish.place is None:
            self.warm()
        assert wish.place is not None
        return wish.place

    def states(self) -> list[str]:
        return [place.state.value for place in self.book.places]

    def end_due(self) -> list[str]:
        """End what is due; return the reasons."""
        due = self.book.due(self.now_s)
        for place, reason in due:
            self.book.end(place, reason, self.now_s)
            self.book.gone(place, self.now_s)
        return [reason for _, reason in due]


# Filling


def test_min_size_are_started_and_a_taken_one_is_replaced_a_moment_later() -> None:
    pool = Pool(min_size=2, max_size=3)
    assert len(pool.warm()) == 2
    pool.get()
    assert pool.start() == [], "first the execution of who took it"
    assert pool.book.next_due_s(pool.now_s) == pool.now_s + REFILL_DELAY_S
    pool.now_s += REFILL_DELAY_S
    assert len(pool.warm()) == 1
    assert sorted(pool.states()) == ["leased", "warm", "warm"]


def test_max_size_counts_every_sandbox_there_is() -> None:
    pool = Pool(min_size=2, max_size=2)
    pool.get("a")
    kept = pool.get("b")
    pool.book.give_back(kept, pool.now_s)
    pool.now_s += 1
    assert pool.start() == []
    pool.book.end(kept, "test", pool.now_s)
    assert pool.start() == [], "while it ends it still takes its place"
    pool.book.gone(kept, pool.now_s)
    assert len(pool.start()) == 1


def test_who_waits_gets_a_start_at_once_and_only_one() -> None:
    pool = Pool(min_size=1, max_size=4)
    first, second = pool.ask(), pool.ask()
    begun = pool.start()
    assert len(begun) == 2
    assert pool.start() == []
    pool.book.started(begun[0], "x", pool.now_s)
    pool.book.match(pool.now_s)
    assert first.place is begun[0]
    assert not second.served.is_set()


def test_a_start_that_fails_is_told_to_the_first_who_waits() -> None:
    pool = Pool(min_size=0, max_size=4)
    first, second = pool.ask(), pool.ask()
    one, _ = pool.start()
    assert pool.book.failed(one, EngineUnavailable("no engine"), pool.now_s)
    assert isinstance(first.error, EngineUnavailable)
    assert not second.served.is_set()


def test_a_start_ahead_of_time_that_fails_is_tried_again_later() -> None:
    pool = Pool(min_size=1)
    [begun] = pool.start()
    assert not pool.book.failed(begun, EngineUnavailable("no engine"), pool.now_s)
    assert pool.start() == []
    assert pool.book.next_due_s(pool.now_s) == pool.now_s + BACKOFF_S
    pool.now_s += BACKOFF_S
    assert len(pool.start()) == 1


def test_a_pool_that_nobody_uses_rests_until_it_is_used() -> None:
    pool = Pool(min_size=2, rest_after_s=60.0, idle_timeout_s=None)
    pool.warm()
    pool.now_s += 59
    assert pool.end_due() == []
    pool.now_s += 1
    assert pool.end_due() == ["idle", "idle"]
    assert pool.start() == []
    pool.book.use(pool.now_s)
    assert len(pool.start()) == 2


# Exhaustion


def test_a_full_pool_lacks_a_place_until_one_is_ending() -> None:
    pool = Pool(min_size=0, max_size=1)
    held = pool.get()
    wish = pool.ask()
    assert pool.start() == []
    assert pool.book.lacks_place(wish)
    assert not pool.book.give_back(held, pool.now_s)
    assert not pool.book.lacks_place(wish), "it is free in a moment"
    pool.book.gone(held, pool.now_s)
    pool.warm()
    assert wish.place is not None
    assert wish.place is not held


def test_overflow_starts_an_extra_one_but_not_where_a_place_is_about_to_be_free() -> None:
    pool = Pool(min_size=0, max_size=1)
    held = pool.get()
    extra = pool.ask(overflow=True)
    pool.warm()
    assert extra.place is not None
    assert len(pool.book.places) == 2
    pool.book.give_back(extra.place, pool.now_s)
    pool.book.gone(extra.place, pool.now_s)
    pool.book.give_back(held, pool.now_s)
    pool.ask(overflow=True)
    assert pool.start() == []
    pool.book.gone(held, pool.now_s)
    assert len(pool.start()) == 1


def test_who_may_not_wait_comes_before_who_came_first() -> None:
    pool = Pool(min_size=0, max_size=1)
    pool.get()
    first, nested = pool.ask(), pool.ask(overflow=True)
    pool.warm()
    assert nested.place is not None
    assert not first.served.is_set()


def test_one_extra_start_is_made_for_who_may_not_wait_however_many_wait() -> None:
    pool = Pool(min_size=0, max_size=1)
    pool.get()
    waiting = [pool.ask() for _ in range(5)]
    pool.ask(overflow=True)
    assert len(pool.start()) == 1
    assert pool.start() == []
    assert not any(wish.served.is_set() for wish in waiting)


def test_places_are_given_in_the_order_of_asking() -> None:
    pool = Pool(min_size=0, max_size=1)
    held = pool.get()
    wishes = [pool.ask() for _ in range(3)]
    for wish in wishes:
        assert not wish.served.is_set()
        pool.book.give_back(held, pool.now_s)
        pool.book.gone(held, pool.now_s)
        pool.warm()
        assert wish.place is not None
        held = wish.place


# Affinity


def test_a_session_gets_its_sandbox_back_and_another_one_does_not() -> None:
    pool = Pool(min_size=0)
    own = pool.get("a")
    assert pool.book.give_back(own, pool.now_s)
    assert pool.get("b") is not own
    assert pool.get() is not own
    assert pool.get("a") is own


def test_hint_gives_another_one_which_is_nobody_s_afterwards() -> None:
    pool = Pool(min_size=0, affinity="hint")
    own = pool.get("a")
    other = pool.get("a")
    assert other is not own
    assert not pool.book.give_back(other, pool.now_s)
    assert pool.book.give_back(own, pool.now_s)


def test_strict_queue_waits_for_its_own_though_others_are_warm() -> None:
    pool = Pool(min_size=1, max_size=3, affinity="strict_queue")
    own = pool.get("a")
    pool.now_s += 1
    pool.warm()
    wish = pool.ask("a")
    assert not wish.served.is_set()
    assert pool.book.busy(wish)
    assert not pool.book.lacks_place(wish)
    pool.book.give_back(own, pool.now_s)
    pool.book.match(pool.now_s)
    assert wish.place is own


def test_strict_fail_fast_says_who_has_it() -> None:
    pool = Pool(min_size=0, affinity="strict_fail_fast")
    pool.get("a")
    with pytest.raises(PoolSessionBusy, match=r"'p'.*'a'.*in use by who wants a") as raised:
        raise pool.ask("a").error or AssertionError
    assert (raised.value.pool, raised.value.session) == ("p", "a")


def test_a_session_never_waits_for_itself() -> None:
    pool = Pool(min_size=0, affinity="strict_queue")
    pool.get("a")
    wish = pool.ask("a", overflow=True, held="a")
    assert isinstance(wish.error, PoolSessionBusy)
    assert "would never end" in str(wish.error)


@pytest.mark.parametrize("affinity", ["strict_queue", "strict_fail_fast"])
def test_a_strict_session_whose_sandbox_is_gone_is_told_why_until_it_is_ended_by_name(affinity: str) -> None:
    pool = Pool(min_size=0, affinity=affinity)
    own = pool.get("a")
    pool.book.end(own, "died", pool.now_s)
    pool.book.gone(own, pool.now_s)
    for _ in range(2):
        error = pool.ask("a").error
        assert isinstance(error, PoolSessionGone)
        assert "(died)" in str(error)
    del pool.book.ended["a"]
    assert pool.get("a") is not own


def test_a_hint_is_given_up_for_a_sandbox_that_is_gone() -> None:
    pool = Pool(min_size=0, affinity="hint")
    own = pool.get("a")
    pool.book.end(own, "died", pool.now_s)
    pool.book.gone(own, pool.now_s)
    again = pool.get("a")
    assert again is not own
    assert pool.book.give_back(again, pool.now_s), "it is the session's from now on"


def test_two_who_begin_the_same_strict_session_need_one_sandbox() -> None:
    pool = Pool(min_size=0, affinity="strict_queue")
    first, second = pool.ask("a"), pool.ask("a")
    assert len(pool.warm()) == 1
    assert first.place is not None
    assert not second.served.is_set()


def test_a_hint_gives_way_to_who_needs_its_place_a_strict_one_does_not() -> None:
    for affinity, reasons in (("hint", ["its place was needed"]), ("strict_queue", [])):
        pool = Pool(min_size=0, max_size=2, affinity=affinity)
        for session in ("older", "newer"):
            pool.book.give_back(pool.get(session), pool.now_s)
            pool.now_s += 1
        pool.ask()
        assert pool.end_due() == reasons
        assert pool.book.of_session("newer") is not None


def test_the_memory_of_ended_sessions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("host_client.pool_book._MAX_ENDED", 3)
    pool = Pool(min_size=0)
    for number in range(5):
        place = pool.get(f"s{number}")
        pool.book.end(place, "test", pool.now_s)
        pool.book.gone(place, pool.now_s)
    assert list(pool.book.ended) == ["s2", "s3", "s4"]


# Recycling


def test_uses_count_the_interpreters_of_one_session() -> None:
    pool = Pool(min_size=0, max_uses=2, affinity="strict_queue")
    own = pool.get("a")
    assert pool.book.give_back(own, pool.now_s)
    assert pool.get("a") is own
    assert not pool.book.give_back(own, pool.now_s)
    assert "used 2 times" in str(pool.ask("a").error)


def test_age_ends_what_is_not_in_use_and_what_is_given_back() -> None:
    pool = Pool(min_size=1, max_age_s=60.0, idle_timeout_s=None)
    kept, held = pool.get("a"), pool.get("b")
    pool.book.give_back(kept, pool.now_s)
    pool.now_s += 1
    pool.warm()
    pool.now_s += 58.5
    assert pool.end_due() == []
    pool.now_s += 0.5
    assert pool.end_due() == ["age"]
    assert held.state is PlaceState.LEASED
    assert not pool.book.give_back(held, pool.now_s)
    pool.now_s += 1
    assert pool.end_due() == ["age"], "the warm one, started later"


def test_idle_ends_kept_ones_and_the_warm_beyond_min_size() -> None:
    pool = Pool(min_size=1, max_size=4, idle_timeout_s=30.0)
    pool.book.give_back(pool.get("a"), pool.now_s)
    gave_up = [pool.ask() for _ in range(2)]
    assert len(pool.start()) == 2
    for wish in gave_up:
        pool.book.waiting.remove(wish)
    for place in pool.book.of(PlaceState.STARTING):
        pool.book.started(place, "x", pool.now_s)
    pool.now_s += 29
    assert pool.end_due() == []
    assert pool.book.next_due_s(pool.now_s) == pool.now_s + 1
    pool.now_s += 1
    assert sorted(pool.end_due()) == ["idle", "idle"]
    assert pool.states() == ["warm"]


def test_health_is_asked_of_what_nobody_uses_at_its_interval() -> None:
    pool = Pool(min_size=2, max_size=3, health_interval_s=10.0)
    pool.warm()
    held = pool.get()
    assert pool.book.health_due(pool.now_s + 9) == []
    asked = pool.book.health_due(pool.now_s + 10)
    assert len(asked) == 1
    assert held not in asked
    assert pool.book.health_due(pool.now_s + 11) == []


# Settings


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"max_size": 0}, "max_size=0"),
        ({"min_size": 5, "max_size": 4}, "min_size=5"),
        ({"max_size": 1000}, "max_size=1000"),
        ({"max_waiting": -1}, "max_waiting=-1"),
        ({"max_uses": 0}, "max_uses=0"),
        ({"wait_timeout_s": None}, "wait_timeout_s=None"),
        ({"idle_timeout_s": -3}, "idle_timeout_s=-3"),
        ({"exhaustion": "panic"}, "exhaustion='panic'.*fail_fast, wait, overflow"),
        ({"affinity": "strict"}, "affinity='strict'.*hint, strict_queue, strict_fail_fast"),
        ({"name": "no spaces"}, "name='no spaces'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(BadSetting, match=named):
        PoolConfig(**{"name": "p", **config})
