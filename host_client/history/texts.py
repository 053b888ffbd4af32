"""Values as the history keeps them: masked, bounded, and plain JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from broker.protocol.messages import Outcome
from host_client.results import ExecutionRecord

Mask = Callable[[str], str]

#: Of one text; a prompt of a long run fits, a runaway one does not fill the disk.
MAX_CHARS = 100_000
#: Of one value as JSON.
MAX_JSON_CHARS = 1_000_000
_MAX_ITEMS = 1_000
_encode = json.JSONEncoder(ensure_ascii=False).encode
_MAX_DEPTH = 8


def clipped(text: str, limit: int = MAX_CHARS) -> str:
    """Return a text with its middle left out where it is too long."""
    if len(text) <= limit:
        return text
    kept = limit // 2
    return f"{text[:kept]}\n... ({len(text) - 2 * kept:,} of {len(text):,} characters left out) ...\n{text[-kept:]}"


def as_json(value: Any, mask: Mask) -> str:
    """Return any value as JSON; what JSON lacks is named by its type."""
    text = _encode(bounded(value, mask))
    return text if len(text) <= MAX_JSON_CHARS else _encode(clipped(text, MAX_JSON_CHARS // 2))


class _Room:
    """How many characters of one value may still be kept: a list may hold one large text a thousand times."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = MAX_JSON_CHARS


def bounded(value: Any, mask: Mask, depth: int = 0, room: _Room | None = None) -> Any:
    """Return a value as what JSON has, its texts masked, each bounded and all of them together."""
    room = room or _Room()
    if value is None or isinstance(value, (bool, int, float)):
        return (
            value
            if not isinstance(value, int) or -(1 << 63) <= value < 1 << 63
            else f"<int of {value.bit_length()} bits>"
        )
    if room.left <= 0:
        return described(value)
    if isinstance(value, str):
        text = clipped(mask(value))
        room.left -= len(text) + 1
        return text
    room.left -= 1
    if depth < _MAX_DEPTH:
        if isinstance(value, Mapping):
            items = itertools.islice(value.items(), _MAX_ITEMS)
            return {clipped(mask(str(key)), 1_000): bounded(item, mask, depth + 1, room) for key, item in items}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [bounded(item, mask, depth + 1, room) for item in itertools.islice(value, _MAX_ITEMS)]
        if callable(dumped := getattr(value, "model_dump", None)) and not isinstance(value, type):
            return bounded(dumped(), mask, depth + 1, room)
    return described(value)


def described(value: Any) -> str:
    """Return what a value is, without the value: ``str, 1,204 characters``."""
    kind = type(value).__name__
    if isinstance(value, str):
        return f"{kind}, {len(value):,} characters"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{kind}, {' x '.join(map(str, shape))}"
    if isinstance(value, (bytes, bytearray, list, tuple, dict, set, frozenset)):
        return f"{kind}, {len(value):,} {'bytes' if isinstance(value, (bytes, bytearray)) else 'items'}"
    return kind


def output_text(record: ExecutionRecord) -> str:
    """Return what an execution showed: what was printed, then the value or the answer."""
    shown = record.display
    if record.outcome is Outcome.SUBMITTED:
        shown = f"SUBMIT {as_json(record.value, str)}"
    elif shown is None and record.value is not None:
        shown = as_json(record.value, str)
    return "\n".join(text for text in (record.text, shown) if text)


def size_of(value: Any) -> int | None:
    """Return how long an answer is as text, where that is known without writing it."""
    if isinstance(value, (str, bytes, bytearray)):
        return len(value)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return sum(map(len, value))
    return None if value is None else len(as_json(value, lambda text: text))
