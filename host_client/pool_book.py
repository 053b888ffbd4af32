"""Who gets which place of a pool, what is to be started, and what has had its time: decisions only.

It starts nothing, waits for nothing and knows no threads; ``PoolCore`` does what is decided here, and holds its lock.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter, OrderedDict
from typing import Any, Generic, TypeVar

from host_client.errors import PoolError, PoolSessionBusy, PoolSessionGone, SandboxError
from host_client.pool_config import Affinity, PoolConfig
from host_client.pool_place import Place, PlaceState

Sandbox = TypeVar("Sandbox")

#: The first execution of who took a warm sandbox comes before the start of the next one: both want the CPU.
REFILL_DELAY_S = 0.2
#: An engine that failed is not asked again at once for sandboxes that nobody waits for.
BACKOFF_S = 10.0
#: Sessions whose end is remembered, to tell who asks for them; the oldest are forgotten.
_MAX_ENDED = 1000
_IDLE = (PlaceState.WARM, PlaceState.KEPT)


@dataclasses.dataclass(eq=False)
class Wish:
    """Somebody asks for a place.

    Attributes:
        session: Of that named session, or None for any fresh one.
        holder: Who asks, for people.
        since_s: Since when, on the pool's clock.
        may_overflow: Gets an extra place where none is free.
        held_sessions: Named sessions that who asks holds already: waiting for one of them would never end.
        place: What it got.
        error: Why it gets none.
        served: Set with either.
    """

    session: str | None
    holder: str
    since_s: float
    may_overflow: bool
    held_sessions: frozenset[str] = frozenset()
    place: Place[Any] | None = None
    error: SandboxError | None = None
    served: threading.Event = dataclasses.field(default_factory=threading.Event)


class PoolBook(Generic[Sandbox]):
    """The places of a pool, and who waits for one. Not safe between threads.

    Attributes:
        places: Those that are not free.
        waiting: In the order in which they came.
        ended: Why the sandboxes of named sessions were ended, by session.
        counts: What happened so far, by name.
    """

    def __init__(self, config: PoolConfig, now_s: float) -> None:
        self._config = config
        self.places: list[Place[Sandbox]] = []
        self.waiting: list[Wish] = []
        self.ended: OrderedDict[str, str] = OrderedDict()
        self.counts: Counter[str] = Counter()
        self._last_use_s = now_s
        self._refill_from_s = now_s
        self._healthy_s = now_s

    def of(self, *states: PlaceState) -> list[Place[Sandbox]]:
        """Return the places in one of these states."""
        return [place for place in self.places if place.state in states]

    def of_session(self, session: str) -> Place[Sandbox] | None:
        """Return the place whose sandbox holds the variables of a named session, or None."""
        found = [place for place in self.of(PlaceState.LEASED, PlaceState.KEPT) if place.session == session]
        return found[0] if found else None

    # Handing out

    def match(self, now_s: float) -> None:
        """Give places to those who wait, as far as there are any; those who may not wait for free ones come first."""
        for wish in self._in_order():
            try:
                found = self._place_for(wish)
            except PoolError as error:
                self._serve(wish, error=error)
                continue
            if found is not None:
                place, session = found
                place.lend(session, wish.holder, now_s)
                self._last_use_s, self._refill_from_s = now_s, max(self._refill_from_s, now_s + REFILL_DELAY_S)
                self._serve(wish, place=place)

    def lacks_place(self, wish: Wish) -> bool:
        """Tell whether nothing is under way that would give this one a place."""
        needy = self._needy()
        if wish not in needy:
            return False
        coming = len(self.of(PlaceState.STARTING)) + max(0, self._free() + len(self.of(PlaceState.ENDING)))
        return needy.index(wish) >= coming

    def busy(self, wish: Wish) -> bool:
        """Tell whether this one waits for a session's sandbox that another user has."""
        return wish.session is not None and not self._fresh_will_do(wish)

    # Starting and ending

    def to_start(self, now_s: float) -> int:
        """Return how many sandboxes to start now: for those who wait, and to have ``min_size`` warm."""
        needy = self._needy()
        # In the order in which they will be served: the first ones are those whose sandbox is starting.
        missing = needy[len(self.of(PlaceState.STARTING)) :]
        free = max(0, self._free())
        # A place whose sandbox is ending is free in a moment; nobody needs an extra one before.
        soon = max(0, self._free() + len(self.of(PlaceState.ENDING)))
        extra = sum(wish.may_overflow for wish in missing[soon:])
        self.counts["overflowed"] += extra
        for_waiting = min(len(missing), free)
        spare = 0
        # Not while somebody waits: the starts would share the CPU.
        if not needy and now_s >= self._refill_from_s and not self._rests(now_s):
            spare = min(self._lacking(), free)
        return for_waiting + extra + max(0, spare)

    def started(self, place: Place[Sandbox], sandbox: Sandbox, now_s: float) -> None:
        """Note a start that went well."""
        self.counts["started"] += 1
        self._refill_from_s = now_s
        place.ready(sandbox, now_s)

    def failed(self, place: Place[Sandbox], error: SandboxError, now_s: float) -> bool:
        """Note a start that failed, and tell the first who waits for one; return whether anybody did."""
        self.counts["failed"] += 1
        self.gone(place, now_s)
        needy = self._needy()
        if needy:
            self._serve(needy[0], error=error)
        self._refill_from_s = now_s + BACKOFF_S
        return bool(needy)

    def give_back(self, place: Place[Sandbox], now_s: float) -> bool:
        """Keep the sandbox of a named session for it; return False where it has to be ended."""
        if place.state is not PlaceState.LEASED:
            return False
        self._last_use_s = now_s
        why_not = self._why_not_kept(place, now_s)
        if why_not is None:
            place.keep(now_s)
            return True
        self.end(place, why_not, now_s)
        return False

    def end(self, place: Place[Sandbox], reason: str, now_s: float) -> None:
        """Note that a sandbox is being ended, and for a named session why."""
        if place.session is not None and place.may_be_kept:
            self.ended[place.session] = reason
            self.ended.move_to_end(place.session)
            while len(self.ended) > _MAX_ENDED:
                self.ended.popitem(last=False)
        self.counts[f"ended: {reason}"] += 1
        place.end(now_s)

    def gone(self, place: Place[Sandbox], now_s: float) -> None:
        """Note that a place is free."""
        place.gone(now_s)
        self.places.remove(place)

    def due(self, now_s: float) -> list[tuple[Place[Sandbox], str]]:
        """Return what is not in use and has had its time, with the reason."""
        found = [(place, self._why_due(place, now_s)) for place in self.of(*_IDLE)]
        due = [(place, reason) for place, reason in found if reason is not None]
        surplus = len(self.of(PlaceState.WARM)) - (0 if self._rests(now_s) else self._config.min_size)
        for place in self.of(PlaceState.WARM):
            if surplus <= sum(each.state is PlaceState.WARM for each, _ in due):
                break
            if all(place is not each for each, _ in due) and (self._rests(now_s) or self._idled(place, now_s)):
                due.append((place, "idle"))
        return due + self._to_evict()

    def health_due(self, now_s: float) -> list[Place[Sandbox]]:
        """Return what to ask whether it is well, where it is time for that."""
        if now_s < self._healthy_s + self._config.health_interval_s:
            return []
        self._healthy_s = now_s
        return self.of(*_IDLE)

    def next_due_s(self, now_s: float) -> float | None:
        """Return when there is something to do again, on the pool's clock, if nothing happens before."""
        times = [self._healthy_s + self._config.health_interval_s] if self.of(*_IDLE) else []
        for place in self.of(*_IDLE):
            times += [place.started_s + limit for limit in (self._config.max_age_s,) if limit is not None]
            if self._config.idle_timeout_s is not None:
                times.append(place.since_s + self._config.idle_timeout_s)
        if self._config.rest_after_s is not None and self.of(PlaceState.WARM):
            times.append(self._last_use_s + self._config.rest_after_s)
        if self._lacking() > 0 and self._free() > 0 and not self._rests(now_s):
            times.append(self._refill_from_s)
        # What was due before now has just been done; a warm one among min_size may be idle for as long as it likes.
        return min((each for each in times if each > now_s), default=None)

    def use(self, now_s: float) -> None:
        """Note that the pool is about to be used: it does not rest."""
        self._last_use_s = now_s

    def refill_now(self, now_s: float) -> None:
        """Note that warm sandboxes are wanted without delay."""
        self._last_use_s = self._refill_from_s = now_s

    # What the above is decided by

    def _in_order(self) -> list[Wish]:
        return sorted(self.waiting, key=lambda wish: not wish.may_overflow)

    def _needy(self) -> list[Wish]:
        """Those who wait for a fresh sandbox; of several for the same new session, one."""
        needy: dict[Any, Wish] = {}
        for wish in self._in_order():
            if self._fresh_will_do(wish):
                strict = wish.session is not None and self._config.affinity is not Affinity.HINT
                needy.setdefault(wish.session if strict else id(wish), wish)
        return list(needy.values())

    def _fresh_will_do(self, wish: Wish) -> bool:
        hint = self._config.affinity is Affinity.HINT
        return wish.session is None or hint or self.of_session(wish.session) is None

    def _place_for(self, wish: Wish) -> tuple[Place[Sandbox], str | None] | None:
        warm = next(iter(self.of(PlaceState.WARM)), None)
        if wish.session is None:
            return None if warm is None else (warm, None)
        own = self.of_session(wish.session)
        if own is not None and own.state is PlaceState.KEPT:
            return own, wish.session
        if self._config.affinity is not Affinity.HINT:
            self._refuse_what_cannot_be(wish.session, own, wish.held_sessions)
            return None if own is not None or warm is None else (warm, wish.session)
        # Its own sandbox is in use: another one, which is nobody's afterwards.
        return None if warm is None else (warm, wish.session if own is None else None)

    def _refuse_what_cannot_be(self, session: str, own: Place[Sandbox] | None, held: frozenset[str]) -> None:
        pool = self._config.name
        if own is None and session in self.ended:
            raise PoolSessionGone(
                f"pool {pool!r}: the sandbox of session {session!r} is gone ({self.ended[session]}), and its variables "
                "with it",
                help=f"to start it anew: pool.end_session({session!r}) first",
                pool=pool,
                session=session,
            )
        itself = session in held
        if own is not None and (itself or self._config.affinity is Affinity.STRICT_FAIL_FAST):
            raise PoolSessionBusy(
                f"pool {pool!r}: the sandbox of session {session!r} is in use by {own.holder}"
                + ", around this call: waiting for it would never end" * itself,
                help="use another session name here" if itself else "affinity='strict_queue' waits for it",
                pool=pool,
                session=session,
            )

    def _serve(self, wish: Wish, *, place: Place[Sandbox] | None = None, error: SandboxError | None = None) -> None:
        wish.place, wish.error = place, error
        self.waiting.remove(wish)
        wish.served.set()

    def _free(self) -> int:
        """Places that are free; below 0 while there are extra ones."""
        return self._config.max_size - len(self.places)

    def _lacking(self) -> int:
        """How many are missing of those to be kept warm, where nobody waits."""
        return self._config.min_size - len(self.of(PlaceState.WARM, PlaceState.STARTING))

    def _rests(self, now_s: float) -> bool:
        limit_s = self._config.rest_after_s
        return limit_s is not None and now_s >= self._last_use_s + limit_s

    def _idled(self, place: Place[Sandbox], now_s: float) -> bool:
        limit_s = self._config.idle_timeout_s
        return limit_s is not None and now_s >= place.since_s + limit_s

    def _why_due(self, place: Place[Sandbox], now_s: float) -> str | None:
        if self._config.max_age_s is not None and now_s >= place.started_s + self._config.max_age_s:
            return "age"
        return "idle" if place.state is PlaceState.KEPT and self._idled(place, now_s) else None

    def _why_not_kept(self, place: Place[Sandbox], now_s: float) -> str | None:
        if place.session is None or not place.may_be_kept:
            return "used"
        if self._config.max_uses is not None and place.uses >= self._config.max_uses:
            return f"used {place.uses} times"
        if self._why_due(place, now_s) == "age":
            return "age"
        living = len(self.places) - len(self.of(PlaceState.ENDING))
        return "its place was an extra one" if living > self._config.max_size else None

    def _to_evict(self) -> list[tuple[Place[Sandbox], str]]:
        """With affinity as a hint, a place that is only kept for a session goes to who waits; longest kept first."""
        if self._config.affinity is not Affinity.HINT:
            return []
        missing = len(self._needy()) - len(self.of(PlaceState.STARTING))
        missing -= max(0, self._free() + len(self.of(PlaceState.ENDING)))
        kept = sorted(self.of(PlaceState.KEPT), key=lambda place: place.since_s)
        return [(place, "its place was needed") for place in kept[: max(0, missing)]]
