"""The sandbox's structured logs as lines for a person."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator
from typing import Any

#: A line without end is cut into pieces of this size: the text comes from inside the sandbox.
_MAX_LINE_BYTES = 64 << 10
_EVENT_WIDTH = 18
_SOURCE_WIDTH = 10


def lines_of(chunks: Iterable[bytes]) -> Iterator[str]:
    """Put lines together from pieces that end anywhere."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace")
        if len(rest) > _MAX_LINE_BYTES:
            yield rest.decode("utf-8", "replace")
            rest = b""
    if rest:
        yield rest.decode("utf-8", "replace")


def readable(line: str) -> str:
    """Return one log line for a person: time, source, event, fields; what is not JSON stays as it is.

    Control characters are escaped: a log must not drive the terminal that shows it.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or "event" not in entry:
        return plain(line)
    time, source, event = _time(entry.pop("at", None)), str(entry.pop("from", "")), str(entry.pop("event"))
    level = str(entry.pop("level", ""))
    blocks = [str(entry.pop(name)) for name in list(entry) if "\n" in str(entry[name])]
    fields = " ".join(f"{plain(str(name))}={_value(value)}" for name, value in entry.items())
    head = [time, plain(source).ljust(_SOURCE_WIDTH), *([plain(level)] if level else []), plain(event)]
    text = "  ".join([*head[:-1], head[-1].ljust(_EVENT_WIDTH), fields]).rstrip()
    return "\n".join([text, *(f"      {plain(row)}" for block in blocks for row in block.rstrip("\n").split("\n"))])


def plain(text: str) -> str:
    """Escape what a terminal would act on."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return plain(value) if value and " " not in value else json.dumps(value, ensure_ascii=True)
    return plain(json.dumps(value))


def _time(at: Any) -> str:
    if isinstance(at, (int, float)):
        try:
            moment = datetime.datetime.fromtimestamp(at).astimezone()
            return moment.isoformat(sep=" ", timespec="milliseconds")[:23]
        except (OverflowError, OSError, ValueError):
            pass
    return "-" * 23
