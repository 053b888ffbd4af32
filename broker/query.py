"""Reading query strings."""

from __future__ import annotations

import math
from collections.abc import Mapping

from broker.errors import BadRequest


class TargetQuery(dict[str, str]):
    """The query of a request target that comes again and again: the same object each time, told apart by identity.

    So what was read off it once can be kept.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


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
