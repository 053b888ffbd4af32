"""What tools report while they run, for whoever watches the interpreter."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from host_client.tool_marks import current_call

log = logging.getLogger(__name__)

#: A terminal shows a line of it.
_MAX_TEXT_CHARS = 1_000

STARTED, PROGRESS, ENDED, FAILED = "started", "progress", "ended", "failed"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolEvent:
    """Something that happened in a tool call.

    Attributes:
        kind: ``started``, ``progress``, ``ended`` or ``failed``.
        tool: The tool's name.
        call_id: The broker's id of the call; empty where the host called the tool itself.
        execution_id: The execution that made the call; empty as above.
        fraction: How much is done, from 0 to 1, where the tool said it.
        text: What the tool said, or for ``failed`` the name of the exception's class.
        seconds: Since the call started.
    """

    kind: str
    tool: str
    call_id: str = ""
    execution_id: str = ""
    fraction: float | None = None
    text: str | None = None
    seconds: float = 0.0

    @property
    def message(self) -> str:
        """Fraction and text in one short line, such as ``40% · page 2 of 5``."""
        percent = None if self.fraction is None else f"{self.fraction:.0%}"
        return " · ".join(part for part in (percent, self.text) if part)


Listener = Callable[[ToolEvent], Any]


class _Reports:
    """Where the reports of one call go, until it has ended."""

    def __init__(self, listener: Listener, tool: str) -> None:
        self.listener = listener
        self._tool, self._since, self._over = tool, time.monotonic(), False

    def send(self, kind: str, *, fraction: float | None = None, text: str | None = None) -> None:
        """Tell the listener; what it raises is logged, and the tool goes on."""
        if self._over:  # a tool that passed its time limit goes on talking
            return
        self._over = kind in (ENDED, FAILED)
        call = current_call()
        event = ToolEvent(
            kind=kind,
            tool=self._tool,
            call_id="" if call is None else call.call_id,
            execution_id="" if call is None else call.execution_id,
            fraction=fraction,
            text=text,
            seconds=time.monotonic() - self._since,
        )
        try:
            self.listener(event)
        except Exception:
            log.exception("on_tool_event failed")


_reports: contextvars.ContextVar[_Reports | None] = contextvars.ContextVar("rlm_sandbox_reports", default=None)


def progress(done: float | str, text: str | None = None) -> None:
    """Report from inside a tool how far it is; does nothing where nobody listens.

        host_client.progress(0.4)
        host_client.progress("reading page 2")
        host_client.progress(0.4, "page 2 of 5")

    Args:
        done: A fraction from 0 to 1, or a text.
        text: With a fraction: what goes on.

    Raises:
        ValueError: Not such a fraction.
        TypeError: Neither a number nor a text.
    """
    fraction = None
    if isinstance(done, str):
        if text is not None:
            raise TypeError("progress() takes a fraction and a text, or one text")
        text = done
    elif isinstance(done, (int, float)) and not isinstance(done, bool):
        if not math.isfinite(done) or not 0 <= done <= 1:
            raise ValueError(f"progress() takes a fraction from 0 to 1, got {done!r:.80}")
        fraction = float(done)
    else:
        raise TypeError(f"progress() takes a fraction or a text, got {type(done).__name__}")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"progress() takes its text as a str, got {type(text).__name__}")
    reports = _reports.get()
    if reports is not None:
        reports.send(PROGRESS, fraction=fraction, text=None if text is None else text[:_MAX_TEXT_CHARS])


@contextlib.contextmanager
def reporting(listener: Listener | None, tool: str) -> Iterator[None]:
    """Report the start and end of a call, and its progress in between.

    Args:
        listener: Gets the events; None for the one around it, if this call is one of a nested interpreter.
        tool: The tool's name.
    """
    outer = _reports.get()
    chosen = listener or (outer.listener if outer is not None else None)
    if chosen is None:
        yield
        return
    reports = _Reports(chosen, tool)
    token = _reports.set(reports)
    try:
        reports.send(STARTED)
        yield
        reports.send(ENDED)
    except BaseException as error:
        reports.send(FAILED, text=type(error).__name__)
        raise
    finally:
        _reports.reset(token)
