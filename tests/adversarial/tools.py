"""The host's tools that attacks may call, with counters on the host's side."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

#: No tool runs longer, so that a test that fails does not hang.
_MOST_S = 30.0


class Tools:
    """Tools of one target.

    Attributes:
        runs: Real runs by name.
        seen: Arguments of ``tally`` in the order of its runs.
        canary: A secret of the host's; a tool's exception holds it, and no answer may.
    """

    def __init__(self, canary: str) -> None:
        self.runs: Counter[str] = Counter()
        self.seen: list[Any] = []
        self.canary = canary
        self.released = threading.Event()

    def reset(self) -> None:
        """Forget what was counted; ``hang`` waits again."""
        self.runs.clear()
        self.seen.clear()
        self.released.clear()

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Return the tools by name."""

        def shape(*args: Any, **kwargs: Any) -> list[Any]:
            """Tell what came, without giving it back."""
            self.runs["tally"] += 1
            return [len(args), sorted(kwargs), sorted({type(arg).__name__ for arg in args})]

        return {"tally": self.tally, "echo": self.echo, "hang": self.hang, "shape": shape, "stop": self.stop}

    def tally(self, thing: Any = None) -> int:
        """Count a run."""
        self.runs["tally"] += 1
        self.seen.append(thing)
        return self.runs["tally"]

    def echo(self, thing: Any) -> Any:
        """Give back what came."""
        self.runs["tally"] += 1
        return thing

    def hang(self) -> str:
        """Answer only after the execution."""
        self.runs["tally"] += 1
        self.released.wait(_MOST_S)
        return "late"

    def stop(self, how: str) -> None:
        """Raise what is no Exception."""
        self.runs["tally"] += 1
        raise {"exit": SystemExit, "keyboard": KeyboardInterrupt, "generator": GeneratorExit}[how](how)
