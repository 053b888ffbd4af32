"""The messages between broker and supervisor: one JSON object in each packet of a SOCK_SEQPACKET pair.

::

    broker → supervisor   {"id": 7, "op": "spawn",  "slot": 3}
                          {"id": 8, "op": "signal", "slot": 3, "pid": 41}
                          {"id": 9, "op": "sweep",  "slot": 3}
                          {"id": 10, "op": "adopt", "slot": 3}  with our end of a copy's channel attached
                          {"id": 11, "op": "end",   "slot": 3, "pid": 57}
    supervisor → broker   {"self_test": {...}}  once, when workers can be started
                          {"re": 7, "pid": 41}  with the worker's channel attached, or {"re": 7, "error": "..."}
                          {"re": 8}
                          {"re": 9, "clean": true}
                          {"re": 10, "pid": 57}  or {"re": 10, "error": "..."}
                          {"re": 11}  once it is gone
                          {"exited": 3, "pid": 41, "reason": "crashed(SIGSEGV)"}
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

#: The self-test's report is the longest.
_PACKET_BYTES = 1 << 15


def send(sock: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    """Send one message, with a file descriptor attached if given.

    Raises:
        OSError: The other side is gone.
    """
    data = json.dumps(message).encode()
    if fd is None:
        sock.send(data)
    else:
        socket.send_fds(sock, [data], [fd])


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next message and the descriptors attached to it, or None at the end.

    Raises:
        BlockingIOError: The socket does not block and holds no message.
    """
    try:
        data, fds, _, _ = _receive(sock)
    except ConnectionError:
        return None
    if not data:
        return None
    message: dict[str, Any] = json.loads(data)
    return message, list(fds)


def _receive(sock: socket.socket) -> tuple[bytes, list[int], int, Any]:
    with contextlib.suppress(ConnectionResetError):
        return socket.recv_fds(sock, _PACKET_BYTES, 1)
    # It ended without having read all: the kernel says so once, ahead of what it had still sent.
    return socket.recv_fds(sock, _PACKET_BYTES, 1)
