"""Connecting to ``host.sock``, which sits in a directory that the sandbox can write to."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path

from host_client.errors import BrokerUnreachable

_PEER_CREDENTIALS = struct.Struct("3i")
_TIMEVAL = struct.Struct("@ll")


def connect(path: Path, *, timeout_s: float) -> socket.socket:
    """Connect to a sandbox's socket, whatever the sandbox put in its place.

    The directory is opened once and the socket is reached through that descriptor: a directory swapped in between is
    not followed, nor is a symlink to some other socket of this user, and a long path does no harm.

    Args:
        path: The socket.
        timeout_s: For connecting; the socket keeps it as its time-out.

    Raises:
        OSError: Nothing is there, or nothing listens (``FileNotFoundError``, ``ConnectionRefusedError``); also
            ``TimeoutError``.
        BrokerUnreachable: What is there is not the sandbox's socket.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        owner = os.fstat(directory).st_uid
        found = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != owner:
            raise BrokerUnreachable(f"{path} is not the socket of a sandbox; it was replaced")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _connect(connection, f"/proc/self/fd/{directory}/{path.name}", timeout_s)
            _check_peer(connection, owner, path)
        except BaseException:
            connection.close()
            raise
        return connection
    finally:
        os.close(directory)


def _connect(connection: socket.socket, address: str, timeout_s: float) -> None:
    # Not settimeout alone: a non-blocking connect to a listener whose queue is full for a moment fails at once.
    _set_send_timeout(connection, max(timeout_s, 0.001))
    try:
        connection.connect(address)
    except BlockingIOError:
        raise TimeoutError(f"the listener did not take the connection within {timeout_s:.1f} s") from None
    _set_send_timeout(connection, 0)
    connection.settimeout(timeout_s)


def _set_send_timeout(connection: socket.socket, timeout_s: float) -> None:
    seconds = int(timeout_s)
    timeval = _TIMEVAL.pack(seconds, int((timeout_s - seconds) * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def _check_peer(connection: socket.socket, owner: int, path: Path) -> None:
    """Refuse a listener under another uid than the directory's; the kernel tells, not the peer."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, uid, _ = _PEER_CREDENTIALS.unpack(raw)
    if uid != owner:
        raise BrokerUnreachable(f"{path} is served by uid {uid}, expected uid {owner}")
