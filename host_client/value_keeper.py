"""The host's side of kept values: a large text is sent once, and referred to while the worker holds it.

``dspy.RLM`` passes all its inputs again with every execution, so without this a 64 MiB context would
cross the socket once for each iteration.
"""

from __future__ import annotations

from typing import NamedTuple

Kept = str | bytes


class KeptState(NamedTuple):
    """What a worker holds at one moment: values by id, and the ids that it is still to drop."""

    held: dict[str, Kept]
    stale: tuple[str, ...]


class ValueKeeper:
    """Implements ``broker.protocol.values.Keeper`` for one session.

    What the last execution did not use is dropped on both sides, so memory is bounded by the inputs of
    one execution. Not thread-safe: one execution runs at a time.

    Args:
        epoch: Of the session's holder; ids of an older one still stand for what it sent.
    """

    def __init__(self, epoch: int = 1) -> None:
        self._prefix = "v" if epoch == 1 else f"v{epoch}."
        self._held: dict[str, Kept] = {}
        self._used: set[str] = set()
        self._new: set[str] = set()
        self._stale: list[str] = []
        self._count = 0

    def known(self, value: Kept) -> str | None:
        """Return the id under which the worker holds this value, or None.

        The same object is recognised at once; an equal one by comparison among those of its type and length.
        """
        for key, held in self._held.items():
            if held is value:
                return self._use(key)
        for key, held in self._held.items():
            if type(held) is type(value) and len(held) == len(value) and held == value:
                return self._use(key)
        return None

    def added(self, value: Kept) -> str:
        """Note that ``value`` is sent now, and return its new id."""
        self._count += 1
        key = f"{self._prefix}{self._count}"
        self._held[key] = value
        self._new.add(key)
        return self._use(key)

    @property
    def referred_bytes(self) -> int:
        """Bytes (characters of a text) of what the next execution uses and the worker holds already."""
        return sum(len(self._held[key]) for key in self._used - self._new)

    def drop(self) -> tuple[str, ...]:
        """Forget what was not used since ``settle``, and return the ids for the worker to drop."""
        unused = [key for key in self._held if key not in self._used]
        for key in unused:
            del self._held[key]
        dropped, self._stale = (*self._stale, *unused), []
        return dropped

    def settle(self, *, arrived: bool) -> None:
        """End one execution.

        Args:
            arrived: Whether the worker surely decoded the variables. Where it is not sure, what was new
                is forgotten here and dropped there, and will be sent again.
        """
        if not arrived:
            for key in self._new:
                self._held.pop(key, None)
                self._stale.append(key)
        self._used.clear()
        self._new.clear()

    def state(self) -> KeptState:
        """Return what the worker holds, between executions."""
        return KeptState(dict(self._held), tuple(self._stale))

    def go_back(self, state: KeptState) -> None:
        """Note that the worker holds what it held then. Ids go on: one that is used again would mean two values."""
        self._held, self._stale = dict(state.held), list(state.stale)

    def copy(self) -> ValueKeeper:
        """Return the keeper of a worker that was forked from this one's."""
        keeper = ValueKeeper()
        keeper._prefix, keeper._count = self._prefix, self._count
        keeper.go_back(self.state())
        return keeper

    def _use(self, key: str) -> str:
        self._used.add(key)
        return key
