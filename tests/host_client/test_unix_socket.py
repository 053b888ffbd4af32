"""What the host connects to, and what it refuses."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_client import unix_socket
from host_client.errors import BrokerUnreachable


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture
def listener(directory: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(directory / "host.sock"))
        listening.listen(8)
        yield listening


def test_it_connects_and_keeps_the_timeout(directory: Path, listener: socket.socket) -> None:
    with unix_socket.connect(directory / "host.sock", timeout_s=3.5) as connection:
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"hello")
            assert connection.recv(5) == b"hello"
        assert connection.gettimeout() == 3.5


def test_a_missing_socket_and_one_without_listener_are_the_systems_errors(directory: Path) -> None:
    with pytest.raises(FileNotFoundError):
        unix_socket.connect(directory / "host.sock", timeout_s=1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        bound.bind(str(directory / "host.sock"))
        with pytest.raises(ConnectionRefusedError):
            unix_socket.connect(directory / "host.sock", timeout_s=1)


def test_a_symlink_to_another_socket_is_not_followed(directory: Path, listener: socket.socket) -> None:
    (directory / "fake.sock").symlink_to(directory / "host.sock")
    with pytest.raises(BrokerUnreachable, match="replaced"):
        unix_socket.connect(directory / "fake.sock", timeout_s=1)


def test_a_symlink_in_place_of_the_directory_is_not_followed(directory: Path, listener: socket.socket) -> None:
    (directory / "link").symlink_to(directory)
    with pytest.raises(OSError, match="directory"):
        unix_socket.connect(directory / "link" / "host.sock", timeout_s=1)


def test_a_file_or_pipe_in_place_of_the_socket_is_refused(directory: Path) -> None:
    os.mkfifo(directory / "host.sock")
    with pytest.raises(BrokerUnreachable, match="replaced"):
        unix_socket.connect(directory / "host.sock", timeout_s=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_socket_of_another_uid_than_the_directorys_is_refused(directory: Path, listener: socket.socket) -> None:
    os.chown(directory / "host.sock", 4242, 4242)
    with pytest.raises(BrokerUnreachable, match="replaced"):
        unix_socket.connect(directory / "host.sock", timeout_s=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_listener_under_another_uid_is_refused(directory: Path, listener: socket.socket) -> None:
    os.chown(directory, 4242, 4242)
    os.chown(directory / "host.sock", 4242, 4242)
    with pytest.raises(BrokerUnreachable, match="served by uid 0, expected uid 4242"):
        unix_socket.connect(directory / "host.sock", timeout_s=1)


def test_a_listener_whose_queue_is_full_for_a_moment_is_waited_for(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(directory / "host.sock"))
        listening.listen(0)
        first = unix_socket.connect(directory / "host.sock", timeout_s=5)
        with pytest.raises(TimeoutError):
            unix_socket.connect(directory / "host.sock", timeout_s=0.05)
        acceptor = threading.Thread(target=lambda: listening.accept()[0].close())
        acceptor.start()
        unix_socket.connect(directory / "host.sock", timeout_s=5).close()
        acceptor.join()
        first.close()


def test_no_descriptor_is_left_behind(directory: Path, listener: socket.socket) -> None:
    before = len(os.listdir("/proc/self/fd"))
    unix_socket.connect(directory / "host.sock", timeout_s=1).close()
    with pytest.raises(FileNotFoundError):
        unix_socket.connect(directory / "missing.sock", timeout_s=1)
    assert len(os.listdir("/proc/self/fd")) == before
