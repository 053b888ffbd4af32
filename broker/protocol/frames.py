"""The frame: a JSON header followed by raw blobs, for HTTP bodies and for the worker's channel.

Layout (all integers big-endian)::

    4 bytes   length H of the header
    H bytes   the header, a JSON object in UTF-8; its key "blobs" lists the blobs' lengths in bytes, if there are any
    ...       the blobs, one after the other; not where the header says "file": true, see ``blob_file``

An HTTP body with a plain JSON object (``application/json``) means the same as a frame without blobs.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from broker.protocol import limits

FRAME_CONTENT_TYPE = "application/vnd.rlm-sandbox.frame"

#: Name of the framed form of a plane in HTTP's Upgrade header.
FRAMED_UPGRADE = "rlm-sandbox.frames"
#: The same where the blobs of requests and replies may also come in a memory file (``blob_file``), whose descriptor is
#: attached to the frame. In the version before, which had no number, only those of executions could.
FILES_UPGRADE = "rlm-sandbox.frames+files/2"
JSON_CONTENT_TYPE = "application/json"

Blob = bytes | bytearray | memoryview

_LENGTH = struct.Struct(">I")


#: The fast reader holds a tree of its own beside the result: from here on the memory counts for more than the time.
_FAST_BYTES = 1 << 20
_loads: Callable[[bytes | bytearray], Any] | None = None
_dumps: Callable[[dict[str, Any]], bytes] | None = None


def use_codec(loads: Callable[[bytes | bytearray], Any], dumps: Callable[[dict[str, Any]], bytes]) -> None:
    """Read and write JSON with these from now on, and with the standard library where they refuse.

    Args:
        loads: Raises ``ValueError`` for what is malformed, NaN and infinities among it.
        dumps: Raises ``TypeError`` for what it cannot write.
    """
    global _loads, _dumps
    _loads, _dumps = loads, dumps


class FrameError(ValueError):
    """The bytes are not a frame, or exceed a limit; the message says which."""


def dump_frame(header: dict[str, Any], blobs: Sequence[Blob] = ()) -> list[Blob]:
    """Return the pieces of a frame, to be written one after the other (the blobs are not copied).

    Args:
        header: JSON object; its key ``blobs`` is set here where there are any.
        blobs: Raw byte strings, in the order in which the header refers to them.
    """
    header = {**header, "blobs": [len(blob) for blob in blobs]} if blobs else header
    head = dump_json(header)
    return [_LENGTH.pack(len(head)) + head, *blobs]


def dump_json(payload: dict[str, Any]) -> bytes:
    """Return a JSON object as compact bytes. It holds no NaN and no infinity: those have a tag (``docs/values.md``)."""
    if _dumps is not None:
        try:
            return _dumps(payload)
        except TypeError:  # it takes no lone surrogates, no keys but strings, and no integers past 64 bits
            pass
    return _ENCODER.encode(payload).encode("ascii")


def containers(data: bytes | bytearray) -> int:
    """Return how many lists and objects a JSON text has at most: brackets in strings are counted too."""
    return data.count(b"[") + data.count(b"{")


def parse_json_object(data: Blob) -> dict[str, Any]:
    """Parse hostile bytes as a JSON object.

    Raises:
        FrameError: Not JSON, nested too deep, too many lists, an integer too long, NaN, or not an object.
    """
    data = data if isinstance(data, (bytes, bytearray)) else bytes(data)
    most = containers(data)
    if _loads is not None and len(data) <= _FAST_BYTES and most <= limits.MAX_JSON_CONTAINERS:
        try:
            parsed = _loads(data)
        except ValueError:  # it is malformed, or has lone surrogates; the standard library has the better words
            parsed = None
        if isinstance(parsed, dict):
            if most > limits.MAX_JSON_DEPTH:  # else it cannot be too deep
                _check_depth(parsed)
            return parsed
    try:
        text = str(data, "utf-8")
        if most > limits.MAX_JSON_CONTAINERS:
            raise ValueError(f"more than {limits.MAX_JSON_CONTAINERS:,} lists and objects")
        parsed = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not a JSON object: {error}") from None
    if not isinstance(parsed, dict):
        raise FrameError(f"expected a JSON object, got {type(parsed).__name__}")
    if most > limits.MAX_JSON_DEPTH:  # else it cannot be too deep
        _check_depth(parsed)
    return parsed


def load_frame(body: Blob, *, max_bytes: int = limits.MAX_FRAME_BYTES) -> tuple[dict[str, Any], list[memoryview]]:
    """Parse a whole frame held in memory; the blobs are views into ``body``.

    Raises:
        FrameError: Truncated, too large, trailing bytes, or a header that is no JSON object.
    """
    view = memoryview(body)
    if len(view) > max_bytes:
        raise FrameError(f"frame of {len(view)} bytes exceeds {max_bytes}")
    if len(view) < _LENGTH.size:
        raise FrameError("truncated frame: no header length")
    (head_length,) = _LENGTH.unpack(view[: _LENGTH.size])
    start = _LENGTH.size + head_length
    if head_length > limits.MAX_HEADER_BYTES or start > len(view):
        raise FrameError(f"truncated frame: header of {head_length} bytes announced")
    header = parse_json_object(view[_LENGTH.size : start])
    blobs: list[memoryview] = []
    for length in blob_lengths(header, max_bytes=max_bytes):
        if start + length > len(view):
            raise FrameError("truncated frame: a blob is shorter than announced")
        blobs.append(view[start : start + length])
        start += length
    if start != len(view):
        raise FrameError(f"{len(view) - start} bytes after the last blob")
    return header, blobs


def read_frame(
    read_exactly: Callable[[int], Blob], *, max_bytes: int = limits.MAX_FRAME_BYTES
) -> tuple[dict[str, Any], list[Blob]]:
    """Read one frame from a stream.

    Args:
        read_exactly: Returns that many bytes, or raises ``EOFError``.
        max_bytes: Largest frame accepted.
    """
    (head_length,) = _LENGTH.unpack(read_exactly(_LENGTH.size))
    if head_length > min(limits.MAX_HEADER_BYTES, max_bytes):
        raise FrameError(f"header of {head_length} bytes exceeds the limit")
    header = parse_json_object(read_exactly(head_length))
    if header.get("file") is True:  # from the broker, the only one that is believed
        return header, []
    return header, [read_exactly(length) for length in blob_lengths(header, max_bytes=max_bytes)]


class FrameAssembler:
    """Puts frames together from a stream of bytes that arrives in pieces of any size.

    Args:
        max_bytes: Largest frame accepted.
        files: Blobs may be in a file, which comes beside the stream; then ``next`` returns none.

    Attributes:
        max_bytes: May be changed between frames.
        size: Bytes of the frame that ``next`` returned last.
        in_file: Whether that frame's blobs are in a file.
    """

    __slots__ = ("_data", "_files", "_frame_end", "_header", "_header_end", "_lengths", "in_file", "max_bytes", "size")

    def __init__(self, max_bytes: int = limits.MAX_FRAME_BYTES, *, files: bool = False) -> None:
        self.max_bytes, self._files = max_bytes, files
        # Bytes where they came in one piece, as nearly every frame does: no copy, no buffer.
        self._data: bytes | bytearray = b""
        self._header: dict[str, Any] | None = None
        self._lengths: list[int] = []
        self._header_end = self._frame_end = 0
        self.size = 0
        self.in_file = False

    @property
    def started(self) -> bool:
        """Whether bytes of a frame are held that is not whole yet."""
        return bool(self._data)

    @property
    def missing(self) -> int:
        """Bytes missing to the end of the current frame, or 0 where that is not known yet."""
        return max(0, self._frame_end - len(self._data)) if self._header is not None else 0

    def add(self, data: Blob) -> None:
        """Take in bytes."""
        if not self._data:
            self._data = data if type(data) is bytes else bytearray(data)
            return
        if type(self._data) is bytes:
            self._data = bytearray(self._data)
        self._data += data

    def next(self) -> tuple[dict[str, Any], list[memoryview]] | None:
        """Return the next whole frame, or None. The blobs are views.

        Raises:
            FrameError: These bytes are no frame, or too large a one.
        """
        data = self._data
        if not data or (self._header is None and not self._read_header()):
            return None
        end = self._frame_end
        if len(data) < end or self._header is None:
            return None
        header, self._header = self._header, None
        self.size = end
        if len(data) == end:
            self._data = b""
        elif isinstance(data, bytearray) and not self._lengths:
            del data[:end]
        else:
            self._data = bytearray(memoryview(data)[end:])
        if not self._lengths:
            return header, []
        view, start, blobs = memoryview(data), self._header_end, []
        for length in self._lengths:
            blobs.append(view[start : start + length])
            start += length
        return header, blobs

    def _read_header(self) -> bool:
        data = self._data
        if len(data) < 4:
            return False
        length = int.from_bytes(data[:4], "big")
        if length > limits.MAX_HEADER_BYTES or length > self.max_bytes:
            raise FrameError(f"header of {length} bytes exceeds the limit")
        end = 4 + length
        if len(data) < end:
            return False
        header = parse_json_object(data[4:end])
        self.in_file = self._files and "file" in header and header["file"] is True
        self._lengths = []
        if "blobs" in header and not self.in_file:  # those of a file have a limit of their own
            self._lengths = list(blob_lengths(header, max_bytes=self.max_bytes))
        self._header_end = end
        self._frame_end = end + sum(self._lengths)
        self._header = header
        return True


def blob_lengths(header: dict[str, Any], *, max_bytes: int) -> Iterator[int]:
    """Yield the lengths that a header announces, checked one by one and in sum."""
    lengths = header.get("blobs", [])
    if not isinstance(lengths, list):
        raise FrameError("'blobs' must be a list of lengths")
    total = 0
    for length in lengths:
        if type(length) is not int or length < 0:
            raise FrameError("'blobs' must list non-negative integers")
        total += length
        if total > max_bytes:
            raise FrameError(f"blobs of more than {max_bytes} bytes")
        yield length


def _finite(text: str) -> float:
    """Refuse ``1e999``: it would become an infinity here, which JSON cannot carry any further."""
    number = float(text)
    if number in (math.inf, -math.inf):
        raise ValueError(f"{text[:40]} is out of range")
    return number


def _check_depth(parsed: dict[str, Any]) -> None:
    """Refuse what a parser takes but a serialiser a few frames deeper may not."""
    level: list[Any] = [parsed]
    for _ in range(limits.MAX_JSON_DEPTH):
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inside for item in items if isinstance(item, (dict, list))]
        if not level:
            return
    raise FrameError(f"not a JSON object: nested deeper than {limits.MAX_JSON_DEPTH} levels")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Made once: json.loads and json.dumps build a new one for every call that deviates from the defaults.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
