"""Values as a REPL shows them."""

from __future__ import annotations

from typing import Any

from broker.protocol import limits
from broker.worker import shown

_ATOMS = frozenset({type(None), bool, int, float, str})


def is_plain(value: Any, depth: int = 0) -> bool:
    """Tell whether a value is what JSON has: exactly these types, all the way down (tuples count as lists)."""
    kind = type(value)
    if kind in _ATOMS:
        return True
    if depth > limits.MAX_DEPTH:
        return False
    if kind is dict:
        return set(map(type, value)) <= _ATOMS and _all_plain(list(value.values()), depth)
    return (kind is list or kind is tuple) and _all_plain(value, depth)


def _all_plain(items: list[Any] | tuple[Any, ...], depth: int) -> bool:
    return set(map(type, items)) <= _ATOMS or all(is_plain(item, depth + 1) for item in items)


def display(value: Any) -> str | None:
    """Return what a REPL prints for a value: nothing for None, a str as it is, else its ``repr``, bounded."""
    if value is None:
        return None
    shown.note(value)
    try:
        text = str.__str__(value) if isinstance(value, str) else _repr(value)
    except Exception as error:
        return (
            f"<{type_name(type(value))} object; its repr() failed: {type_name(type(error))}: {safe_str(error)[:200]}>"
        )
    return clip(text, limits.MAX_DISPLAY_CHARS)


def _repr(value: Any) -> str:
    # Each element takes three characters at least, so the rest would be cut off anyway.
    most = limits.MAX_DISPLAY_CHARS // 3 + 1
    if type(value) is list and len(value) > most:
        return f"{repr(value[:most])[:-1]}, ...] ({len(value):,} items)"
    return str.__str__(repr(value))


def clip(text: str, limit: int) -> str:
    """Cut a text in the middle, with a note of how much is missing."""
    if len(text) <= limit:
        return text
    note = f"\n... ({len(text) - limit:,} of {len(text):,} characters left out) ...\n"
    head = limit * 3 // 4
    return text[:head] + note + text[len(text) - (limit - head) :]


def type_name(kind: type) -> str:
    """Return a class's name, whatever its metaclass pretends."""
    return str.__str__(type.__dict__["__name__"].__get__(kind))[:200]


def safe_str(error: BaseException) -> str:
    """Return ``str(error)``, or a note where that fails or is no text."""
    try:
        return str.__str__(str(error))
    except Exception:
        return f"<the text of this {type_name(type(error))} could not be read>"
