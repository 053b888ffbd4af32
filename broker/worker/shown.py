"""The last table that a session showed as the value of a last expression, kept until the host collects it.

State of the process, which is one session's: nothing is kept before the host has asked for artefacts.
"""

from __future__ import annotations

import sys
from typing import Any

_keeping = False
_table: Any = None


def keep_from_now_on() -> None:
    """Keep what is shown from now on."""
    global _keeping
    _keeping = True


def note(value: Any) -> None:
    """Take note of a value that is shown; only a pandas DataFrame is kept."""
    global _table
    if _keeping and isinstance(value, getattr(sys.modules.get("pandas"), "DataFrame", ())):
        _table = value


def take() -> Any:
    """Return the table that was shown last since this was called, or None."""
    global _table
    table, _table = _table, None
    return table
