"""Claims about the frame format: what is written can be read, and hostile bytes are refused."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol import limits
from broker.protocol.frames import FrameError, dump_frame, load_frame, parse_json_object, read_frame


def exactly(data: bytes) -> Any:
    stream = io.BytesIO(data)

    def read(count: int) -> bytes:
        got = stream.read(count)
        if len(got) < count:
            raise EOFError
        return got

    return read


#: Larger ones have a tag of their own: no reader of JSON is trusted with them.
_INTEGERS = st.integers(min_value=-(2**63), max_value=2**63 - 1)


@given(st.dictionaries(st.text(), _INTEGERS | st.text()), st.lists(st.binary(), max_size=5))
def test_a_frame_is_read_as_it_was_written(header: dict[str, Any], blobs: list[bytes]) -> None:
    header.pop("blobs", None)
    wire = b"".join(dump_frame(header, blobs))
    for got_header, got_blobs in (load_frame(wire), read_frame(exactly(wire))):
        assert {key: got_header[key] for key in header} == header
        assert [bytes(blob) for blob in got_blobs] == blobs


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_are_a_frame(data: bytes) -> None:
    try:
        header, _ = load_frame(data)
    except FrameError:
        return
    assert isinstance(header, dict)


def frame(header: bytes, rest: bytes = b"") -> bytes:
    return struct.pack(">I", len(header)) + header + rest


@pytest.mark.parametrize(
    ("wire", "says"),
    [
        (b"", "truncated"),
        (b"\x00\x00", "truncated"),
        (b"\xff\xff\xff\xff{}", "truncated"),
        (frame(b"[]"), "object"),
        (frame(b"{"), "not a JSON"),
        (frame(b'{"blobs": 5}'), "list"),
        (frame(b'{"blobs": [-1]}'), "non-negative"),
        (frame(b'{"blobs": [true]}', b"x"), "non-negative"),
        (frame(b'{"blobs": [4]}', b"xx"), "shorter"),
        (frame(b'{"blobs": [1]}', b"xx"), "after the last blob"),
        (frame(json.dumps({"blobs": [10**15]}).encode()), "more than"),
    ],
    ids=range(11),
)
def test_malformed_frames_are_refused(wire: bytes, says: str) -> None:
    with pytest.raises(FrameError, match=says):
        load_frame(wire)


@pytest.mark.parametrize(
    "text",
    [
        b"NaN",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": 1' + b"0" * 5000 + b"}",
        b"\xff",
    ],
    ids=range(7),
)
def test_hostile_json_is_refused(text: bytes) -> None:
    with pytest.raises(FrameError):
        parse_json_object(text)


def test_a_frame_larger_than_allowed_is_refused() -> None:
    wire = b"".join(dump_frame({}, [b"x" * 100]))
    with pytest.raises(FrameError, match="exceeds"):
        load_frame(wire, max_bytes=50)
    with pytest.raises(FrameError, match="more than"):
        read_frame(exactly(wire), max_bytes=50)


def test_json_of_too_many_lists_is_refused_before_it_takes_a_hundred_times_its_size() -> None:
    many = b"[" + b"[]," * limits.MAX_JSON_CONTAINERS + b"0]"
    with pytest.raises(FrameError, match="more than 1,000,000 lists"):
        parse_json_object(b'{"a":' + many + b"}")
