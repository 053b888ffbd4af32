"""The engine's frames around a program's output, however they are cut, and over a connection that ends."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from host_client.providers.exec_stream import ExecStream


def frame(data: bytes, kind: int = 1) -> bytes:
    return struct.pack(">BxxxI", kind, len(data)) + data


@pytest.fixture
def pair() -> Iterator[tuple[ExecStream, socket.socket]]:
    here, engine = socket.socketpair()
    stream = ExecStream(here)
    with engine:
        yield stream, engine
        stream.close()


def test_frames_cut_anywhere_are_the_same_bytes(pair: tuple[ExecStream, socket.socket]) -> None:
    stream, engine = pair
    sent = frame(b"one") + frame(b"complaint", 2) + frame(b"") + frame(b"two" * 1000)
    read = b""
    for cut in range(0, len(sent), 7):
        engine.sendall(sent[cut : cut + 7])
        read += stream.read() or b""
    assert read == b"one" + b"two" * 1000
    assert stream.complaints() == "complaint"
    assert stream.read() is None
    engine.shutdown(socket.SHUT_WR)
    assert stream.read() == b""


def test_what_came_with_the_head_of_the_reply_is_not_lost() -> None:
    here, engine = socket.socketpair()
    with engine:
        stream = ExecStream(here, frame(b"early\n")[:10])
        engine.sendall(frame(b"early\n")[10:])
        assert stream.read_line(timeout_s=20) == b"early\n"
        stream.close()


def test_a_first_line_that_never_comes_ends_in_time_or_says_why(pair: tuple[ExecStream, socket.socket]) -> None:
    stream, engine = pair
    with pytest.raises(TimeoutError):
        stream.read_line(timeout_s=0.01)
    engine.sendall(frame(b"OCI runtime exec failed:\x1b[31m no") + frame(b" such file\n", 2))
    engine.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError, match=r"^OCI runtime exec failed: \[31m no such file$"):
        stream.read_line(timeout_s=20)


@pytest.mark.parametrize("said", [b"HTTP/1.1 500 no\r\n\r\n", struct.pack(">BxxxI", 1, 1 << 30)])
def test_what_is_not_the_engine_s_is_an_error(pair: tuple[ExecStream, socket.socket], said: bytes) -> None:
    stream, engine = pair
    engine.sendall(said)
    with pytest.raises(OSError, match="not the engine's"):
        stream.read()


def test_writing_takes_what_fits_and_does_not_wait(pair: tuple[ExecStream, socket.socket]) -> None:
    stream, _ = pair
    data, sent = bytes(1 << 20), 0
    while taken := stream.write(data):
        sent += taken
    assert 0 < sent < 64 << 20
