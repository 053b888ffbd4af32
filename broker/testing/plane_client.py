"""Speaks plain HTTP to either plane, for tests. Any thread may use one; each thread gets a connection of its own."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from broker.protocol.frames import FRAME_CONTENT_TYPE, JSON_CONTENT_TYPE, Blob, dump_frame, load_frame

#: Longer than any long poll.
_TIMEOUT_S = 60.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


class PlaneClient:
    """A client of ``host.sock`` or ``guest.sock``.

    Args:
        path: The socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._all: list[_UnixConnection] = []

    def request(
        self, method: str, path: str, payload: dict[str, Any] | None = None, blobs: Sequence[Blob] = ()
    ) -> tuple[int, dict[str, Any], list[memoryview]]:
        """Send one request; return the status, the JSON object and the blobs of the reply."""
        body, headers = b"", {}
        if payload is not None:
            body = b"".join(dump_frame(payload, blobs)) if blobs else json.dumps(payload).encode()
            headers["Content-Type"] = FRAME_CONTENT_TYPE if blobs else JSON_CONTENT_TYPE
        connection = self._connection()
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        data = response.read()
        if response.headers["Content-Type"] == FRAME_CONTENT_TYPE:
            reply, raw = load_frame(data)
            return response.status, reply, raw
        return response.status, json.loads(data), []

    def close(self) -> None:
        """Close every connection."""
        for connection in self._all:
            connection.close()

    def _connection(self) -> _UnixConnection:
        connection: _UnixConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = _UnixConnection(self._path)
            self._all.append(connection)
        return connection
