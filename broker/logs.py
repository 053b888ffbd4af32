"""Structured logs: one JSON object per line on stderr, escaped, and bounded in rate.

No code and no values are logged: what generated code wrote may not find its way into somebody's terminal.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from typing import Any, TextIO

from broker.tool_calls import Clock

#: Lines per second in the long run, and at once. A hostile session cannot fill the log, or spend our time on it.
LINES_PER_S = 20.0
BURST_LINES = 200

_MAX_TEXT_CHARS = 4_000


class Log:
    """Writes events.

    Args:
        stream: Where to.
        clock: Monotonic seconds, for the rate.
    """

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._tokens, self._refilled_at = float(BURST_LINES), clock()
        self._dropped = 0

    def event(self, name: str, **fields: Any) -> None:
        """Write one event with its fields, unless there were too many."""
        if not self._take_token():
            self._dropped += 1
            return
        if self._dropped:
            fields["dropped_before"], self._dropped = self._dropped, 0
        line = {"at": round(time.time(), 3), "from": "broker", "event": name}
        line.update(
            {key: value[:_MAX_TEXT_CHARS] if isinstance(value, str) else value for key, value in fields.items()}
        )
        self._stream.write(json.dumps(line, default=str) + "\n")
        self._stream.flush()

    def defect(self, where: str, error: BaseException) -> None:
        """Write an unexpected exception with its traceback."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.event("defect", where=where, error=type(error).__name__, traceback=text[-_MAX_TEXT_CHARS:])

    def _take_token(self) -> bool:
        now = self._clock()
        self._tokens = min(float(BURST_LINES), self._tokens + (now - self._refilled_at) * LINES_PER_S)
        self._refilled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
