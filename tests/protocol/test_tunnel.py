"""Many connections over one stream: order, back-pressure, ends, and what an end that breaks the rules gets."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from broker.protocol.tunnel import SILENCE_S, WINDOW_BYTES, Pipes, Tunnel, TunnelBroken
from broker.testing.clock import FakeClock

_OPEN, _DATA, _CREDIT, _END, _PING = range(1, 6)


class Broker:
    """Serves each connection on a thread."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self.connected = 0

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.connected += 1
        threading.Thread(target=self._run, args=(theirs,), daemon=True).start()
        return ours

    def _run(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self._serve(sock)


def hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def echo(sock: socket.socket) -> None:
    while data := sock.recv(1 << 16):
        sock.sendall(data)


@contextlib.contextmanager
def tunnel(connect: Callable[[], socket.socket]) -> Iterator[Tunnel]:
    """The host's end of a tunnel whose other end connects so; both have ended afterwards."""
    here, there = socket.socketpair()
    host = Tunnel(Pipes(here.fileno(), here.fileno()))
    relay = Tunnel(Pipes(there.fileno(), there.fileno()), connect)
    with here, there, ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(each.run) for each in (host, relay)]
        ends[0].add_done_callback(lambda _: hang_up(here))
        try:
            yield host
        finally:
            host.close()
            for end in ends:
                assert end.exception(20) is None


def received(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (piece := sock.recv(1 << 16)):
        data += piece
    return bytes(data)


def test_many_connections_keep_their_bytes_and_their_order() -> None:
    broker = Broker(echo)

    def talk(number: int) -> bool:
        sent = struct.pack(">I", number) * 20_000
        with host.open() as sock:
            sender = threading.Thread(target=sock.sendall, args=(sent,))
            sender.start()
            same = received(sock, len(sent)) == sent
            sender.join()
            return same

    with tunnel(broker.connect) as host, ThreadPoolExecutor(50) as threads:
        assert all(threads.map(talk, range(100)))
    assert broker.connected == 100


def test_a_reader_that_does_not_read_holds_a_window_and_nobody_else_up() -> None:
    sent: list[int] = []
    stuck = threading.Event()

    def flood(sock: socket.socket) -> None:
        if sock.recv(1) == b"e":
            echo(sock)
            return
        sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            for _ in range(1000):
                sent.append(sock.send(bytes(64 << 10)))
        stuck.set()

    with tunnel(Broker(flood).connect) as host, host.open() as lazy, host.open() as other:
        lazy.sendall(b"f")
        assert stuck.wait(20), "the sender is held up"
        # What is under way: a window, and what the kernel keeps for the three sockets on the way.
        assert sum(sent) <= WINDOW_BYTES + (4 << 20)
        other.sendall(b"e" + b"still here")
        assert received(other, 10) == b"still here"


def test_the_end_of_either_side_reaches_the_other_after_all_bytes() -> None:
    gone = threading.Event()

    def serve(sock: socket.socket) -> None:
        if sock.recv(1) == b"b":
            sock.sendall(bytes(3 << 20))
            return
        while sock.recv(1):
            pass
        gone.set()

    with tunnel(Broker(serve).connect) as host:
        with host.open() as sock:
            sock.sendall(b"b")
            assert len(received(sock, 1 << 30)) == 3 << 20
        with host.open() as sock:
            sock.sendall(b"h")
        assert gone.wait(20)


def test_what_cannot_be_connected_to_is_an_end_and_the_tunnel_goes_on() -> None:
    broker = Broker(echo)
    refusals = iter([True, False])

    def connect() -> socket.socket:
        if next(refusals):
            raise ConnectionRefusedError
        return broker.connect()

    with tunnel(connect) as host:
        with host.open() as sock:
            assert sock.recv(1) == b""
        with host.open() as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"


def test_the_end_of_the_tunnel_is_the_end_of_its_connections_and_refuses_new_ones() -> None:
    with tunnel(Broker(echo).connect) as host:
        sock = host.open()
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        host.close()
        with sock:
            assert sock.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        host.open()


def hostile(*messages: bytes) -> BaseException | None:
    """Return how the host's end ends when the other one says this, after a connection was opened."""
    here, there = socket.socketpair()
    with here, there:
        host = Tunnel(Pipes(here.fileno(), here.fileno()))
        sock = host.open()
        end: Future[None] = Future()

        def run() -> None:
            try:
                host.run()
                end.set_result(None)
            except BaseException as error:
                end.set_exception(error)
            finally:
                hang_up(here)

        threading.Thread(target=run, daemon=True).start()
        assert there.recv(9) == struct.pack(">BII", _OPEN, 1, 0)
        with contextlib.suppress(OSError):  # it may be cut off before it has said all
            there.sendall(b"".join(messages))
            there.shutdown(socket.SHUT_WR)
        with sock:
            return end.exception(20)


def message(kind: int, channel: int = 1, size: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">BII", kind, channel, size) + data


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([message(_OPEN, 7)], "must not be opened"),
        ([message(9)], "kind 9"),
        ([message(0)], "kind 0"),
        ([message(_DATA, 1, WINDOW_BYTES + 1)], "a piece of"),
        ([message(_DATA, 1, 1 << 16, bytes(1 << 16))] * 20, "more bytes than were credited"),
        ([message(_CREDIT, 1, 1)], "more credit"),
    ],
)
def test_whoever_breaks_the_rules_is_cut_off(said: list[bytes], words: str) -> None:
    error = hostile(*said)
    assert isinstance(error, TunnelBroken)
    assert words in str(error)


def test_what_is_said_of_a_connection_that_is_gone_is_no_offence() -> None:
    gone = [message(_DATA, 99, 3, b"abc"), message(_CREDIT, 99, 5), message(_END, 99), message(_PING), message(_END)]
    assert hostile(*gone) is None


def test_who_hears_nothing_for_long_takes_the_other_end_for_dead_and_says_something_before() -> None:
    clock = FakeClock()
    here, there = socket.socketpair()
    there.settimeout(20)
    with here, there, ThreadPoolExecutor(1) as threads:
        host = Tunnel(Pipes(here.fileno(), here.fileno()), clock=clock)
        end = threads.submit(host.run)
        try:
            clock.advance(SILENCE_S / 2)
            there.sendall(message(_PING, 0))  # wakes it: the clock is not the kernel's
            assert there.recv(9) == message(_PING, 0)
            clock.advance(SILENCE_S)
            with contextlib.suppress(ConnectionRefusedError):
                host.open().close()
            with pytest.raises(TimeoutError, match="nothing was heard"):
                end.result(20)
        finally:
            host.close()
