"""Strict reading of JSON objects that come from the other side of a boundary."""

from __future__ import annotations

import enum
from typing import Any, TypeVar

JsonObject = dict[str, Any]

_Member = TypeVar("_Member", bound=enum.Enum)
_MISSING = object()


class BadRequest(ValueError):
    """A field is missing, of the wrong type or out of range; the message names it."""


class Reader:
    """Reads typed fields off one JSON object.

    Args:
        data: The parsed object.
        where: What it is, for error messages, such as ``claim request``.
    """

    __slots__ = ("_data", "_where")

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise BadRequest(f"{where}: expected an object, got {type(data).__name__}")
        self._data = data
        self._where = where

    def raw(self, name: str, default: Any = _MISSING) -> Any:
        """Return a field of any JSON type."""
        value = self._data.get(name, default)
        if value is _MISSING:
            raise BadRequest(f"{self._where}: '{name}' is missing")
        return value

    def has(self, name: str) -> bool:
        """Tell whether the field is there and not null."""
        return self._data.get(name) is not None

    def text(self, name: str, default: Any = _MISSING, *, max_chars: int = 1 << 30) -> str:
        """Return a string field of at most ``max_chars`` characters."""
        value = self._data.get(name, default)  # not raw(): dozens of fields are read for each execution
        if type(value) is str and len(value) <= max_chars:
            return value
        value = self.raw(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        if len(value) > max_chars:
            raise BadRequest(f"{self._where}: '{name}' is longer than {max_chars} characters")
        return value

    def optional_text(self, name: str, *, max_chars: int = 1 << 30) -> str | None:
        """Return a string field, or None where it is null or missing."""
        return None if self._data.get(name) is None else self.text(name, max_chars=max_chars)

    def integer(self, name: str, default: Any = _MISSING, *, low: int = 0, high: int = 1 << 53) -> int:
        """Return an integer field within [low, high]."""
        value = self._data.get(name, default)
        if type(value) is int and low <= value <= high:
            return value
        value = self.raw(name, default)
        if type(value) is not int:
            raise self._wrong(name, "an integer", value)
        return int(self._in_range(name, value, low, high))

    def number(self, name: str, default: Any = _MISSING, *, low: float = 0.0, high: float = 1e9) -> float:
        """Return a number field within [low, high] as a float."""
        value = self._data.get(name, default)
        if type(value) is float and low <= value <= high:
            return value
        value = self.raw(name, default)
        if type(value) not in (int, float):
            raise self._wrong(name, "a number", value)
        return float(self._in_range(name, value, low, high))

    def optional_number(self, name: str, *, low: float = 0.0, high: float = 1e9) -> float | None:
        """Return a number field, or None where it is null or missing."""
        return None if self._data.get(name) is None else self.number(name, low=low, high=high)

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        """Return a boolean field."""
        value = self._data.get(name, default)
        if value is True or value is False:
            return value
        value = self.raw(name, default)
        if type(value) is not bool:
            raise self._wrong(name, "true or false", value)
        return value

    def items(self, name: str, default: Any = _MISSING) -> list[Any]:
        """Return a list field."""
        value = self._data.get(name, default)
        if type(value) is list:
            return value
        value = self.raw(name, default)
        if not isinstance(value, list):
            raise self._wrong(name, "a list", value)
        return value

    def texts(self, name: str, default: Any = _MISSING) -> list[str]:
        """Return a list of strings."""
        values = self.items(name, default)
        for value in values:
            if not isinstance(value, str):
                raise self._wrong(name, "a list of strings", value)
        return values

    def mapping(self, name: str, default: Any = _MISSING) -> dict[str, Any]:
        """Return an object field."""
        value = self._data.get(name, default)
        if type(value) is dict:
            return value
        value = self.raw(name, default)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return value

    def member(self, name: str, kind: type[_Member]) -> _Member:
        """Return a member of an enum, given by its value."""
        text = self.text(name)
        try:
            return kind(text)
        except ValueError:
            raise BadRequest(f"{self._where}: '{name}' has the unknown value {text[:40]!r}") from None

    def _in_range(self, name: str, value: float, low: float, high: float) -> float:
        if not low <= value <= high:
            raise BadRequest(f"{self._where}: '{name}' must be between {low} and {high}, got {value}")
        return value

    def _wrong(self, name: str, wanted: str, value: Any) -> BadRequest:
        return BadRequest(f"{self._where}: '{name}' must be {wanted}, got {type(value).__name__}")
