"""Why a contender is not in the table."""

from __future__ import annotations


class Unavailable(Exception):
    """This contender cannot run here; the message says why, and what helps."""
