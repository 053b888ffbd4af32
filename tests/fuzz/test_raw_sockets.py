"""Both planes against clients that do not speak HTTP, stop half way, never read, or come by the thousand."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker import daemon
from broker.protocol.frames import FRAMED_UPGRADE
from broker.testing import InProcessBroker
from broker.testing.fake_worker import ok
from tests.fuzz.growth import Growth

PLANES = ("host", "guest")
_TIMEOUT_S = 10.0
#: Somebody who behaves is answered within that, whatever the others do. Two cores run both sides, and other tests.
_PATIENCE_S = 2.0
_UPGRADE = f"GET /v1/frames HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {FRAMED_UPGRADE}\r\n\r\n".encode()

fuzzed = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Planes:
    """A broker with one session, and connections to it."""

    def __init__(self) -> None:
        self.broker = InProcessBroker(lambda execution: ok(1), max_sessions=2)
        self.broker.__enter__()
        self.broker.host.request("POST", "/v1/sessions", {})

    def connect(self, plane: str) -> socket.socket:
        """Return a connection."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(_TIMEOUT_S)
        sock.connect(str(getattr(self.broker, f"{plane}_socket")))
        return sock

    def say(self, plane: str, data: bytes) -> bytes:
        """Send bytes, say that no more come, and return everything that is answered."""
        with self.connect(plane) as sock:
            with contextlib.suppress(OSError):  # it may be cut off while it still sends
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            return _everything(sock)

    def upgraded(self, plane: str) -> socket.socket:
        """Return a connection in the framed form."""
        sock = self.connect(plane)
        sock.sendall(_UPGRADE)
        assert b" 101 " in sock.recv(65536)
        return sock

    def answers(self) -> bool:
        """Tell whether both planes answer somebody who behaves, in time."""
        began = time.monotonic()
        statuses = [
            self.broker.host.request("GET", "/v1/health")[0],
            self.broker.guest.request("GET", "/v1/tool-calls/none")[0],
        ]
        return statuses == [200, 404] and time.monotonic() - began < _PATIENCE_S

    def close(self) -> None:
        """End it."""
        self.broker.__exit__(None, None, None)


@pytest.fixture(scope="module")
def planes() -> Iterator[Planes]:
    made = Planes()
    assert made.answers()
    yield made
    assert made.answers()
    assert "defect" not in made.broker.log_path.read_text()
    made.close()


def _everything(sock: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            answer += piece
    return answer


def _statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize("plane", PLANES)
@fuzzed
@given(data=st.binary(min_size=1, max_size=2000))
def test_bytes_that_are_no_http_get_400_or_nothing(plane: str, planes: Planes, data: bytes) -> None:
    assert all(400 <= status < 500 for status in _statuses(planes.say(plane, data)))


_TOKENS = st.sampled_from(
    [b"GET", b"POST", b" ", b"/v1/health", b"/v1/tool-calls", b"HTTP/1.1", b"HTTP/9.9", b"\r\n", b"\n", b"\r", b":",
     b"\0", b"Content-Length: ", b"Transfer-Encoding: chunked", b"Connection: ", b"Expect: 100-continue", b"-1", b"0",
     b"5", b"99999999999999999999", b"{}", b"x" * 9000, b"\xff", b"%00", b"?wait_s=nan",
     b"Upgrade: rlm-sandbox.frames"]
)  # fmt: skip


@pytest.mark.parametrize("plane", PLANES)
@fuzzed
@given(tokens=st.lists(_TOKENS, min_size=1, max_size=30))
def test_pieces_of_http_in_any_order_are_no_servers_error(plane: str, planes: Planes, tokens: list[bytes]) -> None:
    assert all(status < 500 for status in _statuses(planes.say(plane, b"".join(tokens))))


@pytest.mark.parametrize("plane", PLANES)
@fuzzed
@given(
    data=st.one_of(
        st.binary(min_size=1, max_size=500), st.builds(lambda h: struct.pack(">I", len(h)) + h, st.binary(max_size=200))
    )
)
def test_bytes_that_are_no_frames_end_the_framed_form(plane: str, planes: Planes, data: bytes) -> None:
    with planes.upgraded(plane) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        for status in _framed_statuses(_everything(sock)):
            assert 400 <= status < 500


@pytest.mark.parametrize("plane", PLANES)
@fuzzed
@given(
    header=st.dictionaries(
        st.sampled_from(["request", "body", "blobs", "x"]),
        st.one_of(
            st.none(), st.integers(), st.text(max_size=20), st.lists(st.integers(), max_size=3), st.just({}),
            st.builds(
                "{} {}".format,
                st.sampled_from(["GET", "POST", "X"]),
                st.text(alphabet="/v1sexclaimtoo-?=&", max_size=40),
            ),
        ),
    )
)  # fmt: skip
def test_framed_requests_of_any_shape_are_no_servers_error(
    plane: str, planes: Planes, header: dict[str, object]
) -> None:
    data = json.dumps(header).encode()
    with planes.upgraded(plane) as sock:
        sock.sendall(struct.pack(">I", len(data)) + data)
        sock.shutdown(socket.SHUT_WR)
        for status in _framed_statuses(_everything(sock)):
            assert 400 <= status < 500


def _framed_statuses(answer: bytes) -> list[int]:
    statuses = []
    while answer:
        (length,) = struct.unpack_from(">I", answer)
        header = json.loads(answer[4 : 4 + length])
        statuses.append(header["status"])
        answer = answer[4 + length + sum(header.get("blobs", [])) :]
    return statuses


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a line without end", b"GET /" + b"x" * 2_000_000),
        ("a header without end", b"GET / HTTP/1.1\r\nX: " + b"x" * 2_000_000),
        ("headers without end", b"GET / HTTP/1.1\r\n" + b"X-%d: y\r\n" * 100_000),
        ("the same header twice", b"GET / HTTP/1.1\r\nX: 1\r\nx: 2\r\n\r\n"),
        ("two lengths", b"POST /v1/tool-calls HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 200\r\n\r\n{}"),
        ("a folded header", b"GET / HTTP/1.1\r\nX: 1\r\n 2\r\n\r\n"),
        ("a length below zero", b"POST /v1/tool-calls HTTP/1.1\r\nContent-Length: -5\r\n\r\n"),
        ("a length of words", b"POST /v1/tool-calls HTTP/1.1\r\nContent-Length: ten\r\n\r\n"),
        ("a length of a terabyte", b"POST /v1/tool-calls HTTP/1.1\r\nContent-Length: 1099511627776\r\n\r\n"),
        ("chunks", b"POST /v1/tool-calls HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
        ("chunks and a length", b"POST / HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        ("half a body", b"POST /v1/tool-calls HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{"),
        ("an old version", b"GET /v1/nothing HTTP/0.9\r\n\r\n"),
        ("a proxy's request", b"GET http://elsewhere/v1/nothing HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("a tunnel", b"CONNECT elsewhere:80 HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("a path with a zero", b"GET /v1/tool-calls/%00 HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("a path that is no UTF-8", b"GET /v1/tool-calls/%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("the first line of TLS", bytes.fromhex("1603010200010001fc0303")),
    ],
)  # fmt: skip
def test_malformed_requests_are_the_clients_fault(name: str, data: bytes, plane: str, planes: Planes) -> None:
    statuses = _statuses(planes.say(plane, data))
    assert all(400 <= status < 500 for status in statuses), name
    assert planes.answers()


@pytest.mark.parametrize("plane", PLANES)
def test_a_connection_is_closed_where_the_client_asks_for_it(plane: str, planes: Planes) -> None:
    with planes.connect(plane) as sock:
        sock.sendall(b"GET /v1/nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert _statuses(_everything(sock)) == [404]  # which returns only once it is closed


@pytest.mark.parametrize("plane", PLANES)
def test_a_thousand_requests_in_a_row_are_all_answered_and_others_get_their_turn(plane: str, planes: Planes) -> None:
    one = b"GET /v1/tool-calls/none HTTP/1.1\r\nHost: x\r\n\r\n"
    with planes.connect(plane) as sock:
        sender = threading.Thread(target=lambda: (sock.sendall(one * 1000), sock.shutdown(socket.SHUT_WR)))
        sender.start()
        assert planes.answers()
        assert _statuses(_everything(sock)) == [404] * 1000
        sender.join()


@pytest.mark.parametrize("plane", PLANES)
def test_half_requests_that_are_held_open_keep_nobody_else_waiting(plane: str, planes: Planes) -> None:
    growth = Growth()
    with contextlib.ExitStack() as held:
        for number in range(_affordable(400)):
            sock = held.enter_context(planes.connect(plane))
            sock.sendall((b"GET /v1/he", b"POST /v1/tool-calls HTTP/1.1\r\nContent-Length: 10\r\n\r\n{")[number % 2])
        assert planes.answers()
    assert planes.answers()
    _settled(growth)


@pytest.mark.parametrize("plane", PLANES)
def test_clients_that_never_read_keep_nobody_else_waiting(plane: str, planes: Planes) -> None:
    growth = Growth()
    one = b"GET /v1/tool-calls/" + b"x" * 60 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    with contextlib.ExitStack() as held:
        for _ in range(20):
            sock = held.enter_context(planes.connect(plane))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(one * 100)
        assert planes.answers()
    _settled(growth)


@pytest.mark.parametrize("plane", PLANES)
def test_clients_that_come_and_go_by_the_thousand_leave_nothing(plane: str, planes: Planes) -> None:
    planes.say(plane, b"GET /v1/nothing HTTP/1.1\r\n\r\n")
    growth = Growth()
    for number in range(2000):
        with planes.connect(plane) as sock:
            if number % 2:
                sock.sendall(b"INJECTED \x1b[2J\n\n"[: number % 17 + 1])
    assert planes.answers()
    _settled(growth)
    assert all(json.loads(line) for line in planes.broker.log_path.read_text().splitlines())


def test_one_sessions_connections_are_bounded_and_the_host_is_not_shut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    most = _affordable(300)
    monkeypatch.setattr(daemon, "MAX_GUEST_CONNECTIONS", most)
    planes = Planes()
    try:
        with contextlib.ExitStack() as held:
            for _ in range(most):
                held.enter_context(planes.connect("guest"))
            for _ in range(20):
                refused = planes.say("guest", b"GET /v1/tool-calls/none HTTP/1.1\r\n\r\n")
                assert _statuses(refused) == [429]
            assert planes.broker.host.request("GET", "/v1/health")[0] == 200
        assert planes.answers()
    finally:
        planes.close()


@pytest.mark.parametrize("plane", PLANES)
def test_frames_announced_and_never_sent_take_no_memory(plane: str, planes: Planes) -> None:
    growth = Growth()
    announced = json.dumps(
        {"request": "POST /v1/tool-calls", "body": {}, "blobs": [20_000 if plane == "guest" else 1 << 30]}
    ).encode()
    with contextlib.ExitStack() as held:
        for _ in range(50):
            sock = held.enter_context(planes.upgraded(plane))
            sock.sendall(struct.pack(">I", len(announced)) + announced)
        assert planes.answers()
        for _ in range(50):
            sock = held.enter_context(planes.upgraded(plane))
            sock.sendall(b"\x03\xff\xff\xff")
        assert planes.answers()
    _settled(growth)


def _affordable(wanted: int) -> int:
    """Both ends of each connection are in this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(wanted, (soft - len(os.listdir("/proc/self/fd"))) // 3)


def _settled(growth: Growth) -> None:
    """The broker closes its ends in its own time; it is a thread of this process, which this one keeps busy."""
    give_up_at = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            growth.bounded()
            return
        except AssertionError:
            if time.monotonic() > give_up_at:
                raise
            threading.Event().wait(0.05)  # the broker's thread needs the interpreter, which looking takes from it
