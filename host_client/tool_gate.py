"""How many calls run at the same time, and how many one execution may make."""

from __future__ import annotations

import threading
import time


class ToolBudgetExceeded(RuntimeError):
    """An execution made more calls of a tool than its budget has."""


class ExecutionEnded(RuntimeError):
    """The execution ended while its call waited for a place; the tool did not run."""


class ExecutionScope:
    """What the limits know of one execution.

    Attributes:
        ended: Whether the execution is over; set once.
    """

    def __init__(self) -> None:
        # Guards the three below: a gate in _gates has a call of this execution that waits, or has had one.
        self._lock = threading.Lock()
        self._calls: dict[str, int] = {}
        self._gates: set[Gate] = set()
        self.ended = False

    def spend(self, tool: str, budget: int) -> None:
        """Count one call.

        Raises:
            ToolBudgetExceeded: It is one too many; it is not counted.
        """
        with self._lock:
            calls = self._calls.get(tool, 0)
            if calls >= budget:
                times = "once" if budget == 1 else f"{budget} times"
                raise ToolBudgetExceeded(f"{tool}() may be called {times} in one execution; this call was not run")
            self._calls[tool] = calls + 1

    def waits_at(self, gate: Gate) -> None:
        """Note where the end of the execution must be told."""
        with self._lock:
            self._gates.add(gate)

    def end(self) -> None:
        """The execution is over: calls that wait give up."""
        with self._lock:
            self.ended = True
            gates = list(self._gates)
        for gate in gates:
            gate.look()


class Gate:
    """Lets at most so many calls in; the others wait.

    Args:
        places: How many.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        # Guards _inside: the calls that entered and did not leave, never more than the places.
        self._changed = threading.Condition()
        self._inside = 0

    def enter(self, tool: str, scope: ExecutionScope, give_up_at: float | None) -> None:
        """Take a place, waiting for one.

        Args:
            tool: For errors.
            scope: Whose end ends the wait.
            give_up_at: On the monotonic clock, or None.

        Raises:
            ExecutionEnded: The scope ended first.
            TimeoutError: No place until then.
        """
        scope.waits_at(self)
        with self._changed:
            while self._inside >= self.places and not scope.ended:
                left_s = None if give_up_at is None else give_up_at - time.monotonic()
                if left_s is not None and left_s <= 0:
                    raise TimeoutError(f"{tool}() was not run: its {self.places} places were taken all the time")
                self._changed.wait(left_s)
            if scope.ended:
                raise ExecutionEnded(f"{tool}() was not run: its execution has ended")
            self._inside += 1

    def leave(self) -> None:
        """Give the place back."""
        with self._changed:
            self._inside -= 1
            self._changed.notify()

    def look(self) -> None:
        """Let those who wait look at their scopes again."""
        with self._changed:
            self._changed.notify_all()
