"""Takes the values of secrets out of what comes from a sandbox, before a model, a callback or a file gets it.

The limits of it, which ``docs/security.md`` tells: a text that code has transformed is not recognised.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from broker.protocol.frames import Blob
from broker.protocol.messages import ErrorInfo, ToolResult
from host_client.results import ExecutionRecord
from host_client.secret_values import MIN_CHARS

#: A line of a secret of several lines, such as a key file, is masked on its own too from this length on.
_MIN_LINE_CHARS = 16
#: How the worker marks what it left out of a long text: a secret may be cut in two there.
_CUT = re.compile(r"\n\.\.\. \([\d,]+ of [\d,]+ characters left out\) \.\.\.\n")
_SMALL_BYTES = re.compile(r'"\$bytes": ?"([A-Za-z0-9+/=]*)"')


class Masker:
    """Replaces the values of secrets by ``[secret NAME]``. Without any, everything is returned as it is.

    Args:
        secrets: Values by name.
    """

    def __init__(self, secrets: Mapping[str, str]) -> None:
        self._names = {form: name for name, value in secrets.items() for form in _forms(value)}
        # Longest first: one value may be a part of another.
        self._forms = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._forms)))

    def __bool__(self) -> bool:
        return bool(self._names)

    def __repr__(self) -> str:
        return f"Masker({', '.join(sorted(set(self._names.values())))})"

    @property
    def names(self) -> list[str]:
        """Names of the secrets."""
        return sorted(set(self._names.values()))

    @property
    def longest_bytes(self) -> int:
        """Size of the longest form of a secret: so much of it may lie on either side of a cut."""
        return max((len(form.encode()) for form in self._forms), default=0)

    def found_in(self, data: bytes) -> str | None:
        """Return the name of a secret whose value is in these bytes, or None."""
        return next((self._names[form] for form in self._forms if form.encode() in data), None)

    def text(self, text: str) -> str:
        """Return the text, masked; the same object where there was nothing to mask."""
        if any(form in text for form in self._forms):
            text = self._pattern.sub(lambda found: self._mark(found[0]), text)
        return self._mask_cuts(text) if self._forms and _CUT.search(text) else text

    def value(self, value: Any) -> Any:
        """Return a value as it came from a sandbox, masked all the way down; the same object where nothing was."""
        kind = type(value)
        if kind is str:
            return self.text(value)
        if kind is bytes:
            return self._bytes(value)
        if kind is dict:
            pairs = [(self.value(key), self.value(item)) for key, item in value.items()]
            same = all(key is k and item is i for (key, item), (k, i) in zip(value.items(), pairs, strict=True))
            return value if same else dict(pairs)
        if kind in (list, tuple, set, frozenset):
            items = [self.value(item) for item in value]
            return value if all(a is b for a, b in zip(value, items, strict=True)) else kind(items)
        return value

    def record(self, record: ExecutionRecord) -> ExecutionRecord:
        """Return what is known of an execution, masked."""
        if not self:
            return record
        output = self.text(record.output)
        if record.discarded_output_bytes:
            output = self._mask_end(output)
        return dataclasses.replace(
            record,
            value=self.value(record.value),
            display=None if record.display is None else self.text(record.display),
            output=output,
            error=None if record.error is None else self._error(record.error),
        )

    def is_in(self, result: ToolResult, blobs: Sequence[Blob]) -> bool:
        """Tell whether a tool's result holds a secret."""
        if not self:
            return False
        text = json.dumps(result.to_json())
        pieces = [bytes(blob) for blob in blobs] + [_decoded(found) for found in _SMALL_BYTES.findall(text)]
        return self.text(text) is not text or any(self._bytes(piece) is not piece for piece in pieces)

    def _error(self, error: ErrorInfo) -> ErrorInfo:
        return dataclasses.replace(
            error,
            type=self.text(error.type),
            message=self.text(error.message),
            traceback=self.text(error.traceback),
        )

    def _bytes(self, data: bytes) -> bytes:
        for form in self._forms:
            if (raw := form.encode()) in data:
                data = data.replace(raw, self._mark(form).encode())
        return data

    def _mask_cuts(self, text: str) -> str:
        cuts = _CUT.findall(text)
        parts = _CUT.split(text)
        last = len(parts) - 1
        parts = [self._mask_end(part) if i < last else part for i, part in enumerate(parts)]
        parts = [self._mask_start(part) if i else part for i, part in enumerate(parts)]
        return "".join(part + cut for part, cut in zip(parts, [*cuts, ""], strict=True))

    def _mask_end(self, text: str) -> str:
        """Mask the first part of a secret at the end of a text that was cut off there."""
        for form in self._forms:
            for size in range(min(len(form), len(text)), MIN_CHARS - 1, -1):
                if text.endswith(form[:size]):
                    return text[:-size] + self._mark(form)
        return text

    def _mask_start(self, text: str) -> str:
        for form in self._forms:
            for size in range(min(len(form), len(text)), MIN_CHARS - 1, -1):
                if text.startswith(form[-size:]):
                    return self._mark(form) + text[size:]
        return text

    def _mark(self, form: str) -> str:
        return f"[secret {self._names[form]}]"


#: For a session without secrets.
NOTHING_TO_MASK = Masker({})


def _forms(value: str) -> Iterator[str]:
    """Yield how Python, JSON and URLs write a value, and the lines of one that has several."""
    yield value
    yield from (written[1:-1] for written in (repr(value), ascii(value), json.dumps(value)))
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield urllib.parse.quote(value, safe="")
    yield from (line for line in map(str.strip, value.splitlines()) if len(line) >= _MIN_LINE_CHARS)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except binascii.Error:
        return b""
