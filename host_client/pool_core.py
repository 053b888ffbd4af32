"""The pool of one process: the lock around the book, and the threads that start, check and end sandboxes."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

from host_client import endings
from host_client.dspy_compat import HeldPlace, holding, holding_also
from host_client.errors import (
    PoolClosed,
    PoolExhausted,
    PoolQueueFull,
    PoolSessionBusy,
    PoolWaitTimeout,
    ProviderError,
    SandboxError,
)
from host_client.pool_book import PoolBook, Wish
from host_client.pool_config import Affinity, Exhaustion, PoolConfig
from host_client.pool_place import Place, PlaceState
from host_client.pool_status import PoolStatus, describe, status_of
from host_client.sandbox_session import SandboxSession

log = logging.getLogger(__name__)

#: Warm sandboxes that may turn out dead one after the other before something else must be wrong.
_MAX_DEAD = 5


class Preparable(Protocol):
    """What is in a place; see ``PooledSandbox``."""

    def is_well(self) -> bool:
        """Ask whether it can be used."""

    def take(self) -> SandboxSession:
        """Return its session."""

    def end(self) -> None:
        """End it."""


class PoolCore:
    """What a pool has in one process. A forked child begins with an empty one: warm sandboxes are its parent's.

    Args:
        config: How it behaves.
        start: Starts one sandbox; takes long.
        clock: Monotonic seconds.
    """

    def __init__(
        self, config: PoolConfig, start: Callable[[], Preparable], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self._start, self._clock = start, clock
        # Guards all below. A place in the book is in the hands of the pool, of one start, of one user or of one ending.
        self._changed = threading.Condition(threading.Lock())
        self._book: PoolBook[Preparable] = PoolBook(config, clock())
        self._numbers = itertools.count(1)
        self._keeper: threading.Thread | None = None
        self._wakes_at_s: float | None = None
        self._failure: SandboxError | None = None
        self._closed = False

    def prewarm(self) -> None:
        """Begin to fill the pool, where that has not begun."""
        with self._changed:
            if not self._closed:
                self._book.use(self._clock())
                self._settle()

    def wait_until_warm(self, timeout_s: float) -> bool:
        """Wait until ``min_size`` sandboxes are warm, or as many as there are places for; return whether they are.

        Raises:
            SandboxError: None could be started.
        """
        with self._changed:
            self._failure = None
            self._book.refill_now(self._clock())
            self._settle()
            self._changed.wait_for(lambda: self._closed or self._failure or self._is_warm(), timeout_s)
            if self._failure is not None:
                raise self._failure
            return self._is_warm() and not self._closed

    def acquire(self, session: str | None, holder: str) -> SandboxSession:
        """Take a sandbox, and return its open session; the place is held until the session is given back or closed.

        Raises:
            PoolError: There is none to be had.
            SandboxError: None could be started.
        """
        held = holding()
        for _ in range(_MAX_DEAD):
            place = self._wait_for_place(session, holder, held)
            sandbox = place.sandbox
            assert sandbox is not None
            try:
                if sandbox.is_well():
                    return self._opened(place, sandbox)
            except BaseException:
                self._discard(place, "could not be opened")
                raise
            self._discard(place, "died")
        raise ProviderError(f"pool {self.config.name!r}: {_MAX_DEAD} sandboxes in a row died before they were used")

    def end_session(self, session: str) -> bool:
        """End what is kept for a named session and forget it; one in use ends when it is given back."""
        with self._changed:
            known = self._book.ended.pop(session, None) is not None
            place = self._book.of_session(session)
            if place is None:
                return known
            place.may_be_kept = False
            if place.state is PlaceState.KEPT:
                self._end(place, "ended by name")
            self._settle()
            return True

    def status(self) -> PoolStatus:
        """Return what it looks like now."""
        with self._changed:
            return status_of(self.config, self._book, self._clock())

    def close(self, timeout_s: float) -> bool:
        """End what nobody uses, refuse who asks; what is in use ends when it is given back. Idempotent.

        Returns:
            Whether no start is under way any more.
        """
        with self._changed:
            self._closed = True
            for wish in list(self._book.waiting):
                wish.error = self._closed_error(wish.session)
                self._book.waiting.remove(wish)
                wish.served.set()
            for place in self._book.of(PlaceState.WARM, PlaceState.KEPT):
                self._end(place, "pool closed")
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._book.of(PlaceState.STARTING), timeout_s)

    @property
    def over_and_done(self) -> bool:
        """Whether it was closed, and nothing is left in it."""
        return self._closed and not self._book.places

    # Used by a loan

    def take_back(self, place: Place[Preparable], session: SandboxSession) -> bool:
        """Keep a session's sandbox for it; see ``Loan.take_back``."""
        with self._changed:
            kept = not self._closed and self._book.give_back(place, self._clock())
            if kept:
                session.loan = None
            elif place.state is PlaceState.LEASED:
                self._book.end(place, "pool closed", self._clock())
            self._settle()
            return kept

    def over(self, place: Place[Preparable]) -> None:
        """Note that the sandbox of a place is gone; see ``Loan.over``."""
        with self._changed:
            if place.state is PlaceState.LEASED:
                self._book.end(place, "lost", self._clock())
            if place.state is PlaceState.ENDING:
                self._book.gone(place, self._clock())
            self._settle()

    # Waiting for a place

    def _wait_for_place(self, session: str | None, holder: str, held: tuple[HeldPlace, ...]) -> Place[Preparable]:
        wish = self._enqueue(session, holder, held)
        try:
            give_up_at = wish.since_s + self.config.wait_timeout_s
            while not wish.served.wait(max(0.0, give_up_at - self._clock())):
                with self._changed:
                    if not wish.served.is_set():
                        self._refuse_to_wait_longer(wish)
                # A start is under way for this one: it ends, one way or the other, within a bound of its own.
                give_up_at = self._clock() + self.config.wait_timeout_s
        except BaseException:
            self._withdraw(wish)
            raise
        if wish.error is not None:
            raise wish.error
        assert wish.place is not None
        return wish.place

    def _enqueue(self, session: str | None, holder: str, held: tuple[HeldPlace, ...]) -> Wish:
        with self._changed:
            if self._closed:
                raise self._closed_error(session)
            now_s = self._clock()
            # Who holds a place never waits for another: two who did that for each other's would wait for ever.
            overflow = bool(held) or self.config.exhaustion is Exhaustion.OVERFLOW
            mine = frozenset(name for pool, name in held if pool == id(self) and name is not None)
            wish = Wish(session, holder, now_s, overflow, mine)
            self._book.use(now_s)
            self._book.waiting.append(wish)
            self._settle()
            at_once = wish.place is not None
            self._book.counts["at once" if at_once else "waited"] += 1
            if not wish.served.is_set():
                try:
                    self._refuse_to_wait(wish)
                except BaseException:
                    self._book.waiting.remove(wish)
                    raise
            return wish

    def _refuse_to_wait(self, wish: Wish) -> None:
        lacks = self._book.lacks_place(wish) and not wish.may_overflow
        if lacks and self.config.exhaustion is Exhaustion.FAIL_FAST:
            raise PoolExhausted(
                f"{self._every_place_is_taken()}",
                pool=self.config.name,
                session=wish.session,
                help="exhaustion='wait' waits for one, 'overflow' starts an extra one; or give it a larger max_size",
            )
        if not lacks and not self._book.busy(wish):
            return
        waiting = sum(self._book.busy(each) or self._book.lacks_place(each) for each in self._book.waiting)
        if waiting > self.config.max_waiting:
            raise PoolQueueFull(
                f"{self._every_place_is_taken()}; {waiting - 1} wait already, as many as may",
                pool=self.config.name,
                session=wish.session,
                help="give it a larger max_waiting or max_size",
            )

    def _refuse_to_wait_longer(self, wish: Wish) -> None:
        waited = f"waited {self.config.wait_timeout_s:g} s"
        if wish.session is not None and self._book.busy(wish):
            own = self._book.of_session(wish.session)
            raise PoolSessionBusy(
                f"pool {self.config.name!r}: {waited} for the sandbox of session {wish.session!r}, which "
                f"{'nobody' if own is None else own.holder} holds",
                pool=self.config.name,
                session=wish.session,
                help="shut its interpreter down, or give the pool a longer wait_timeout_s",
            )
        if self._book.lacks_place(wish):
            raise PoolWaitTimeout(
                f"{waited} in vain: {self._every_place_is_taken()}",
                pool=self.config.name,
                session=wish.session,
                help="shut down what is not needed, or give it a larger max_size or wait_timeout_s; inside a tool, "
                "threads of your own must run in contextvars.copy_context() to be known as part of that call",
            )

    def _withdraw(self, wish: Wish) -> None:
        with self._changed:
            if wish in self._book.waiting:
                self._book.waiting.remove(wish)
            elif wish.place is not None:  # it came at the same moment; rare enough not to be saved
                self._end(wish.place, "not wanted any more")
            self._settle()

    def _every_place_is_taken(self) -> str:
        now_s = self._clock()
        holders = [describe(place, now_s) for place in self._book.of(PlaceState.LEASED, PlaceState.KEPT)]
        return f"pool {self.config.name!r}: all {self.config.max_size} places are taken ({'; '.join(holders)})"

    def _closed_error(self, session: str | None) -> PoolClosed:
        return PoolClosed(f"pool {self.config.name!r} was closed", pool=self.config.name, session=session)

    # Handing over

    def _opened(self, place: Place[Preparable], sandbox: Preparable) -> SandboxSession:
        session = sandbox.take()
        # Tools belong to the interpreter; the one before may have had others.
        session.tools_sent = False
        session.loan = PlaceLoan(self, place, session)
        return session

    def _discard(self, place: Place[Preparable], reason: str) -> None:
        with self._changed:
            if place.uses == 1:  # no code ran: the name is as new as it was
                place.may_be_kept = False
            self._end(place, reason)
            self._settle()

    # Doing what the book says; all with the lock held

    def _settle(self) -> None:
        """Hand out, start and end what is to be; to be called after each change."""
        now_s = self._clock()
        self._book.match(now_s)
        if not self._closed:
            for place, reason in self._book.due(now_s):
                self._end(place, reason)
            for _ in range(self._book.to_start(now_s)):
                self._begin_start(now_s)
            self._have_keeper(self._book.next_due_s(now_s))
        self._changed.notify_all()

    def _begin_start(self, now_s: float) -> None:
        endings.of_this_process().prepare()
        place: Place[Preparable] = Place(next(self._numbers), now_s)
        self._book.places.append(place)
        thread = threading.Thread(target=self._run_start, args=(place,), name="rlm-sandbox pool start", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no thread starts any more: the process exits
            self._book.failed(place, ProviderError(f"pool {self.config.name!r}: {error}"), now_s)

    def _have_keeper(self, due_s: float | None) -> None:
        """Have a thread that wakes up in time; one that sleeps long enough is left alone."""
        self._wakes_at_s = due_s
        if due_s is not None and self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name="rlm-sandbox pool", daemon=True)
            self._keeper.start()

    def _end(self, place: Place[Preparable], reason: str) -> None:
        sandbox = place.sandbox
        assert sandbox is not None
        self._book.end(place, reason, self._clock())
        endings.of_this_process().submit(partial(self._run_end, place, sandbox))

    def _is_warm(self) -> bool:
        warm, starting = len(self._book.of(PlaceState.WARM)), len(self._book.of(PlaceState.STARTING))
        left = self.config.max_size - (len(self._book.places) - warm - starting)
        return warm >= min(self.config.min_size, left)

    # Threads

    def _run_start(self, place: Place[Preparable]) -> None:
        try:
            sandbox = self._start()
        except BaseException as error:
            known = error if isinstance(error, SandboxError) else ProviderError(f"a sandbox could not start: {error!r}")
            with self._changed:
                if not self._book.failed(place, known, self._clock()):
                    self._failure = known
                    log.info("pool %s: no sandbox could be started ahead of time: %s", self.config.name, known)
                self._settle()
            return
        with self._changed:
            self._book.started(place, sandbox, self._clock())
            if self._closed:
                self._end(place, "pool closed")
            self._settle()

    def _run_end(self, place: Place[Preparable], sandbox: Preparable) -> None:
        try:
            sandbox.end()
        finally:
            with self._changed:
                self._book.gone(place, self._clock())
                self._settle()

    def _keep(self) -> None:
        while True:
            with self._changed:
                now_s = self._clock()
                # None while nothing will be due: then whatever happens next says when.
                left_s = None if self._wakes_at_s is None else self._wakes_at_s - now_s
                if self._closed:
                    return
                if left_s is None or left_s > 0:
                    self._changed.wait(left_s)
                    continue
                asked = self._book.health_due(now_s)
                self._settle()
            for place in asked:
                self._check(place)

    def _check(self, place: Place[Preparable]) -> None:
        sandbox = place.sandbox
        if sandbox is None or sandbox.is_well():
            return
        with self._changed:
            if place.sandbox is sandbox and place.state in (PlaceState.WARM, PlaceState.KEPT):
                self._end(place, "died")
                self._settle()


class PlaceLoan:
    """A place that an interpreter has; see ``Loan``."""

    def __init__(self, core: PoolCore, place: Place[Preparable], session: SandboxSession) -> None:
        self._core, self._place, self._session = core, place, session

    def take_back(self) -> bool:
        """See ``Loan.take_back``."""
        return self._core.take_back(self._place, self._session)

    def over(self) -> None:
        """See ``Loan.over``."""
        self._core.over(self._place)

    def marked(self) -> AbstractContextManager[None]:
        """See ``Loan.marked``. Where nobody ever waits, nobody needs to know."""
        config = self._core.config
        if config.exhaustion is Exhaustion.OVERFLOW and config.affinity is not Affinity.STRICT_QUEUE:
            return nullcontext()
        return holding_also((id(self._core), self._place.session))
