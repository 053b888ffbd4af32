"""Whether a value given to SUBMIT can be meant for a field of a type; lenient, since the host converts further."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

_LISTS = (list, tuple, set, frozenset)


def fits(value: Any, wanted: str | None) -> bool:
    """Tell whether ``value`` may go into a field of type ``wanted`` (a builtin's name; unknown names take anything)."""
    check = _CHECKS.get(wanted or "")
    if check is None:
        return True
    return check(_unwrapped(value))


def _unwrapped(value: Any) -> Any:
    """A numpy scalar as the Python value it stands for, without importing numpy."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def _is_container(value: Any) -> bool:
    return (
        isinstance(value, (*_LISTS, Mapping, bytes, bytearray)) or hasattr(value, "tolist") or hasattr(value, "to_dict")
    )


def _str(value: Any) -> bool:
    return isinstance(value, str) or (value is not None and not _is_container(value))


def _int(value: Any) -> bool:
    if isinstance(value, str):
        return _parses(value, int)
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _float(value: Any) -> bool:
    if isinstance(value, str):
        return _parses(value, float)
    is_number = isinstance(value, numbers.Real) or type(value).__name__ == "Decimal"
    return is_number and not isinstance(value, bool)


def _bool(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("true", "false")
    return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))


def _list(value: Any) -> bool:
    if isinstance(value, str):
        return value.lstrip().startswith("[")  # JSON, which the host reads
    return isinstance(value, _LISTS) or hasattr(value, "tolist") or hasattr(value, "to_dict")


def _dict(value: Any) -> bool:
    if isinstance(value, str):
        return value.lstrip().startswith("{")  # JSON, which the host reads
    if isinstance(value, Mapping) or hasattr(value, "_asdict"):
        return True
    return hasattr(value, "__dataclass_fields__") or callable(getattr(value, "model_dump", None))


def _parses(text: str, kind: Callable[[str], Any]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": _str,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "list": _list,
    "dict": _dict,
    "NoneType": lambda value: value is None,
}
