"""One place in a pool, and the life of the sandbox in it.

::

                 healthy          taken             given back: of a named session that may come back
      STARTING ──────────► WARM ──────────► LEASED ◄────────────────────────────────► KEPT
          │                 │                 │           taken, by that session        │
          │ failed          │ too old, idle,  │ given back, lost, shut down             │ too old, idle,
          │                 │ died, closed    │                                         │ died, closed, evicted
          │                 └─────────────► ENDING ◄────────────────────────────────────┘
          │                                   │ container and directory are gone
          └────────────────────────────────► GONE   the place is free

A sandbox that ran the code of one session is never handed to another: from LEASED it goes to KEPT, out of which only
the session of the same name gets it, or it ends. ``lend`` refuses anything else.
"""

from __future__ import annotations

import enum
from typing import Generic, TypeVar

from host_client.errors import SandboxError


class PlaceState(enum.Enum):
    """Where the sandbox of a place is in its life."""

    STARTING = "starting"
    WARM = "warm"
    LEASED = "leased"
    KEPT = "kept"
    ENDING = "ending"
    GONE = "gone"


_ALLOWED = {
    PlaceState.STARTING: {PlaceState.WARM, PlaceState.GONE},
    PlaceState.WARM: {PlaceState.LEASED, PlaceState.ENDING},
    PlaceState.LEASED: {PlaceState.KEPT, PlaceState.ENDING},
    PlaceState.KEPT: {PlaceState.LEASED, PlaceState.ENDING},
    PlaceState.ENDING: {PlaceState.GONE},
    PlaceState.GONE: set(),
}

Sandbox = TypeVar("Sandbox")


class IllegalTransition(SandboxError):
    """A defect of the pool: a place cannot go from this state to that one."""

    code = "illegal_transition"


class Place(Generic[Sandbox]):
    """One place. Not safe between threads: the pool's lock guards it.

    Attributes:
        number: Counts the pool's places.
        state: Where it is.
        since_s: When it got there, on the pool's clock.
        started_s: When its sandbox was ready.
        sandbox: What is in it, from WARM on.
        session: The named session that it belongs to, or None.
        holder: Who has it, for people; empty where nobody has.
        uses: How often it was handed out.
        may_be_kept: Whether the session may come back; cleared when it was ended by name.
    """

    def __init__(self, number: int, now_s: float) -> None:
        self.number = number
        self.state = PlaceState.STARTING
        self.since_s = self.started_s = now_s
        self.sandbox: Sandbox | None = None
        self.session: str | None = None
        self.holder = ""
        self.uses = 0
        self.may_be_kept = True

    def ready(self, sandbox: Sandbox, now_s: float) -> None:
        """STARTING to WARM."""
        self._move(PlaceState.WARM, now_s)
        self.sandbox, self.started_s = sandbox, now_s

    def lend(self, session: str | None, holder: str, now_s: float) -> None:
        """WARM or KEPT to LEASED.

        Raises:
            IllegalTransition: Generated code of another session has run in it.
        """
        if self.uses and (session is None or session != self.session):
            raise IllegalTransition(f"place {self.number}: of session {self.session!r}, wanted for {session!r}")
        self._move(PlaceState.LEASED, now_s)
        self.session, self.holder = session, holder
        self.uses += 1

    def keep(self, now_s: float) -> None:
        """LEASED to KEPT, for its session.

        Raises:
            IllegalTransition: It has none.
        """
        if self.session is None:
            raise IllegalTransition(f"place {self.number}: kept for no session")
        self._move(PlaceState.KEPT, now_s)
        self.holder = ""

    def end(self, now_s: float) -> None:
        """WARM, LEASED or KEPT to ENDING."""
        self._move(PlaceState.ENDING, now_s)
        self.holder = ""

    def gone(self, now_s: float) -> None:
        """STARTING or ENDING to GONE."""
        self._move(PlaceState.GONE, now_s)
        self.sandbox = None

    def _move(self, to: PlaceState, now_s: float) -> None:
        if to not in _ALLOWED[self.state]:
            raise IllegalTransition(f"place {self.number}: {self.state.value} -> {to.value}")
        self.state, self.since_s = to, now_s
