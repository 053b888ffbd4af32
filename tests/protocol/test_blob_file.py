"""Claims about blobs in a memory file."""

from __future__ import annotations

import mmap
import os

import pytest

from broker.protocol import fast_json, frames
from broker.protocol.blob_file import BlobFile, as_bytes, is_sealed
from broker.protocol.frames import FrameError, dump_frame, parse_json_object
from broker.protocol.values import Decoder, Encoder


def test_blobs_and_ascii_texts_come_out_as_they_went_in() -> None:
    blobs = ["x" * 5_000_000, b"\0\xff" * 10, bytearray(b"abc"), memoryview(b"de"), b""]
    file = BlobFile.of(blobs)
    received = BlobFile.received([os.dup(file.fd)], file.lengths)
    file.close()
    file.close()
    views = received.views()
    received.close()
    assert [bytes(view) for view in views] == as_bytes(blobs)


def test_nobody_can_change_or_shorten_it() -> None:
    file = BlobFile.of([b"abc"])
    assert is_sealed(file.fd)
    for attempt in (lambda: os.ftruncate(file.fd, 0), lambda: os.pwrite(file.fd, b"x", 0)):
        with pytest.raises(PermissionError):
            attempt()
    with pytest.raises(PermissionError):
        mmap.mmap(file.fd, 3, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    file.close()


def test_what_does_not_hold_is_closed() -> None:
    file = BlobFile.of([b"abc"])
    for fds, lengths in (([os.dup(file.fd)], [4]), ([os.dup(file.fd), os.dup(file.fd)], [3])):
        with pytest.raises(FrameError):
            BlobFile.received(fds, lengths)
        for fd in fds:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
    file.close()


def test_only_ascii_texts_are_left_as_they_are() -> None:
    encoder = Encoder(lazy=True)
    values = ["a" * 10_000, "\u00e9" * 10_000, b"b" * 10_000]
    encoded = encoder.encode(values, "v")
    assert [type(blob) for blob in encoder.blobs] == [str, bytes, bytes]
    assert Decoder(as_bytes(encoder.blobs)).decode(encoded) == values


@pytest.mark.parametrize(
    "payload",
    [
        {"a": [1, 2.5, None, True, "\u00e9\U0001f600"]},
        {"lone": "\ud800"},
        {"large": 2**80},
        {"nested": [[[[{}]]]]},
        {"a": "[{" * 100},
    ],
)
def test_both_codecs_write_what_the_other_one_reads(
    payload: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "_loads", None)
    monkeypatch.setattr(frames, "_dumps", None)
    [plain] = dump_frame(payload)
    assert parse_json_object(plain[4:]) == payload
    fast_json.use()
    assert frames._loads is not None, "orjson comes with DSPy"
    [fast] = dump_frame(payload)
    if "large" not in payload:  # past 64 bits a JSON number is a float there; ours travel as {"$int"}
        assert parse_json_object(plain[4:]) == payload
        assert parse_json_object(fast[4:]) == payload


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"1", b'{"a":NaN}', b'{"a":1e999}', b"{", b'{"a":1}x', b"\xff", b"{'a':1}"]
)
def test_what_is_no_object_is_refused_by_both(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_json.use()
    with pytest.raises(FrameError):
        parse_json_object(text)
    monkeypatch.setattr(frames, "_loads", None)
    with pytest.raises(FrameError):
        parse_json_object(text)
