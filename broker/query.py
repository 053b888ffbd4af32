"""Reading query strings."""

from __future__ import annotations

import math
from collections.abc import Mapping

from broker.errors import BadRequest


def query_number(
    query: Mapping[str, str], name: str, default: float, *, low: float = 0.0, high: float = 86_400.0
) -> float:
    """Read a number from the query string.

    Raises:
        BadRequest: Not a number, or out of range.
    """
    text = query.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise BadRequest(f"query: '{name}' must be a number between {low:g} and {high:g}")
    return number
