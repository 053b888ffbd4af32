"""Claims about HTTP over the Unix socket, against a server that may answer anything."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from broker.protocol.frames import FRAME_CONTENT_TYPE, dump_frame, load_frame
from host_client.errors import BrokerUnreachable, MalformedReply
from host_client.transport import BrokerTimeout, UnixSocketTransport
from tests.host_client.canned_server import canned, reply


def _ask(path: Path, **keywords: object) -> dict[str, object]:
    transport = UnixSocketTransport(path)
    try:
        return transport.request("POST", "/v1/x", {}, timeout_s=5, **keywords).header  # type: ignore[arg-type]
    finally:
        transport.close()


def _hang_up(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def test_json_goes_out_and_comes_back(tmp_path: Path) -> None:
    with canned(tmp_path, reply(b'{"a":[1,"\\ud800"]}', 409)) as server:
        transport = UnixSocketTransport(server.path)
        answer = transport.request("POST", "/v1/x?wait_s=1", {"code": "\ud800\n"}, timeout_s=5)
        transport.close()
    assert (answer.status, answer.header, answer.blobs) == (409, {"a": [1, "\ud800"]}, [])
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/x?wait_s=1 HTTP/1.1\r\nHost: sandbox\r\nContent-Type: application/json\r\n")
    assert json.loads(body) == {"code": "\ud800\n"}


def test_blobs_travel_as_a_frame_in_both_directions(tmp_path: Path) -> None:
    frame = b"".join(dump_frame({"v": 1}, [b"x" * 100_000, b""]))
    with canned(tmp_path, reply(frame, kind=FRAME_CONTENT_TYPE)) as server:
        transport = UnixSocketTransport(server.path)
        answer = transport.request("POST", "/v1/x", {"w": 2}, [b"y" * 10_000_000, memoryview(b"z")], timeout_s=5)
        transport.close()
    assert [bytes(blob) for blob in answer.blobs] == [b"x" * 100_000, b""]
    header, blobs = load_frame(server.requests[0].partition(b"\r\n\r\n")[2])
    assert (header["w"], [len(blob) for blob in blobs]) == (2, [10_000_000, 1])


def test_a_small_request_leaves_in_one_piece(tmp_path: Path) -> None:
    pieces: list[int] = []

    def count(connection: socket.socket) -> None:
        pieces.append(len(connection.recv(1 << 16)))
        connection.sendall(reply())

    listener = socket.socket(socket.AF_UNIX)
    tmp_path.chmod(0o700)
    listener.bind(str(tmp_path / "host.sock"))
    listener.listen()
    thread = threading.Thread(target=lambda: count(listener.accept()[0]))
    thread.start()
    transport = UnixSocketTransport(tmp_path / "host.sock")
    transport.request("POST", "/v1/x", {"w": 2}, [b"y" * 1000], timeout_s=5)
    thread.join()
    transport.close()
    listener.close()
    assert pieces[0] > 1000


def test_a_connection_is_used_again(tmp_path: Path) -> None:
    with canned(tmp_path, *[reply()] * 3) as server:
        transport = UnixSocketTransport(server.path)
        for _ in range(3):
            transport.request("GET", "/v1/x", timeout_s=5)
        transport.close()
    assert server.connections == 1


def test_each_thread_has_a_connection_of_its_own(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=5)

    def together(connection: socket.socket) -> None:
        both.wait()
        connection.sendall(reply())

    with canned(tmp_path, together, together) as server:
        transport = UnixSocketTransport(server.path)
        other = threading.Thread(target=lambda: transport.request("GET", "/v1/x", timeout_s=5))
        other.start()
        transport.request("GET", "/v1/x", timeout_s=5)
        other.join()
        transport.close()
    assert server.connections == 2


def test_a_kept_connection_that_the_broker_closed_is_replaced(tmp_path: Path) -> None:
    with canned(tmp_path, reply(more="Connection: close\r\n"), reply(), _hang_up, reply()) as server:
        transport = UnixSocketTransport(server.path)
        for _ in range(3):
            transport.request("GET", "/v1/x", timeout_s=5)
        transport.close()
    assert server.connections == 3


def test_a_broker_that_hangs_up_is_not_asked_for_ever(tmp_path: Path) -> None:
    with canned(tmp_path, _hang_up, reply()) as server, pytest.raises(BrokerUnreachable, match="closed"):
        _ask(server.path)
    assert server.connections == 1


def test_nobody_there_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnreachable, match="No such file"):
        _ask(tmp_path / "host.sock")


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 40_000,
        reply(b"{}") + b"more",
        reply(b"[]"),
        reply(b"{"),
        reply(b'{"a": NaN}'),
        reply(b'{"a": ' + b"[" * 100_000),
        reply(b'{"a": ' + b"1" * 10_000 + b"}"),
        reply(b"\x00\x00\x00\x04", kind=FRAME_CONTENT_TYPE),
        reply(b"\xff" * 100, kind=FRAME_CONTENT_TYPE),
        reply(b'\x00\x00\x00\x12{"blobs":[1000000]}', kind=FRAME_CONTENT_TYPE),
    ],
)
def test_what_is_no_reply_of_our_protocol_is_malformed(tmp_path: Path, answer: bytes) -> None:
    with canned(tmp_path, answer) as server, pytest.raises(MalformedReply):
        _ask(server.path)


def test_a_body_that_is_announced_too_large_takes_no_memory(tmp_path: Path) -> None:
    huge = b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n{"
    with canned(tmp_path, huge) as server, pytest.raises(MalformedReply, match="at most 1000"):
        _ask(server.path, max_reply_bytes=1000)


def test_a_reply_that_ends_early_is_not_asked_for_again(tmp_path: Path) -> None:
    def cut(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{")
        _hang_up(connection)

    with canned(tmp_path, reply(), cut, reply()) as server:
        transport = UnixSocketTransport(server.path)
        transport.request("GET", "/v1/x", timeout_s=5)
        with pytest.raises(BrokerUnreachable, match="within a reply"):
            transport.request("GET", "/v1/x", timeout_s=5)
        transport.close()
    assert server.connections == 1


def test_a_silent_broker_is_a_timeout(tmp_path: Path) -> None:
    with canned(tmp_path, lambda c: None) as server, pytest.raises(BrokerTimeout, match="within"):
        UnixSocketTransport(server.path).request("GET", "/v1/x", timeout_s=0.05)


def test_a_broker_that_drips_does_not_move_the_deadline(tmp_path: Path) -> None:
    stop = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not stop.wait(0.01):
            connection.sendall(b" ")

    began = time.monotonic()
    with canned(tmp_path, drip) as server, pytest.raises(BrokerTimeout):
        UnixSocketTransport(server.path).request("GET", "/v1/x", timeout_s=0.2)
    stop.set()
    assert time.monotonic() - began < 2


def test_a_path_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    with canned(tmp_path, reply(b'{"a":1}')) as server:
        (folder / "host.sock").hardlink_to(server.path)
        assert _ask(folder / "host.sock") == {"a": 1}


def test_a_symlink_to_another_socket_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "sandbox"
    folder.mkdir()
    with canned(tmp_path, reply()) as server:
        (folder / "host.sock").symlink_to(server.path)
        with pytest.raises(BrokerUnreachable, match="replaced"):
            _ask(folder / "host.sock")
    assert server.connections == 0


def test_a_forked_child_does_not_use_its_parents_connections(tmp_path: Path) -> None:
    with canned(tmp_path, reply(b'{"n":1}'), reply(b'{"n":2}'), reply(b'{"n":3}')) as server:
        transport = UnixSocketTransport(server.path)
        transport.request("GET", "/v1/x", timeout_s=5)
        child = os.fork()
        if child == 0:
            try:
                os._exit(int(str(transport.request("GET", "/v1/x", timeout_s=5).header["n"])))
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        assert transport.request("GET", "/v1/x", timeout_s=5).header == {"n": 3}
        transport.close()
    assert server.connections == 2


def test_close_closes_what_is_idle_and_what_is_given_back_later(tmp_path: Path) -> None:
    transport: UnixSocketTransport

    def close_meanwhile(connection: socket.socket) -> None:
        transport.close()
        connection.sendall(reply())

    with canned(tmp_path, reply(), close_meanwhile) as server:
        transport = UnixSocketTransport(server.path)
        for _ in range(2):
            transport.request("GET", "/v1/x", timeout_s=5)
        assert not any(transport._idle.values())
