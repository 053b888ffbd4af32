"""What a pool tells people about itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from host_client.pool_book import PoolBook
from host_client.pool_config import PoolConfig
from host_client.pool_place import Place, PlaceState


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """A pool at one moment; ``print`` shows it.

    Attributes:
        name: Its name.
        min_size: Sandboxes kept warm.
        max_size: Places.
        states: Places by state: ``starting``, ``warm``, ``leased``, ``kept``, ``ending``.
        waiting: Who waits for a place, and since how many seconds.
        holders: Who holds a place, and since when.
        sessions: Named sessions that have a sandbox, and its state.
        counts: What happened so far: ``at once`` and ``waited`` (sandboxes handed out), ``started``, ``failed``
            (starts), ``overflowed`` (extra starts), ``ended: REASON``.
    """

    name: str
    min_size: int
    max_size: int
    states: Mapping[str, int]
    waiting: tuple[str, ...]
    holders: tuple[str, ...]
    sessions: Mapping[str, str]
    counts: Mapping[str, int]

    def __str__(self) -> str:
        in_state = ", ".join(f"{number} {state}" for state, number in self.states.items() if number) or "empty"
        lines = [f"pool {self.name}: {in_state} (keeps {self.min_size} warm, {self.max_size} places)"]
        lines += [f"  held by {each}" for each in self.holders]
        lines += [f"  waiting: {each}" for each in self.waiting]
        lines += [f"  so far: {', '.join(f'{number} {what}' for what, number in self.counts.items())}"] * bool(
            self.counts
        )
        return "\n".join(lines)


def status_of(config: PoolConfig, book: PoolBook[Any], now_s: float) -> PoolStatus:
    """Return a pool's status; the caller holds the pool's lock."""
    return PoolStatus(
        name=config.name,
        min_size=config.min_size,
        max_size=config.max_size,
        states={state.value: len(book.of(state)) for state in PlaceState if state is not PlaceState.GONE},
        waiting=tuple(f"{wish.holder}{_for(wish.session)} for {now_s - wish.since_s:.1f} s" for wish in book.waiting),
        holders=tuple(describe(place, now_s) for place in book.of(PlaceState.LEASED, PlaceState.KEPT)),
        sessions={place.session: place.state.value for place in book.places if place.session is not None},
        counts=dict(sorted(book.counts.items())),
    )


def describe(place: Place[Any], now_s: float) -> str:
    """Return who has a place, and since when."""
    who = place.holder or "nobody, kept"
    return f"{who}{_for(place.session)} for {now_s - place.since_s:.1f} s"


def _for(session: str | None) -> str:
    return "" if session is None else f" (session {session!r})"
