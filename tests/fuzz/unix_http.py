"""``requests`` over a Unix socket, for schemathesis."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

_TIMEOUT_S = 30.0


class _Connection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("sandbox", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


class _Pool(HTTPConnectionPool):
    def __init__(self, path: Path) -> None:
        super().__init__("sandbox", maxsize=1)
        self._path = path

    def _new_conn(self) -> _Connection:
        return _Connection(self._path)


class _Adapter(HTTPAdapter):
    def __init__(self, path: Path) -> None:
        self._pool = _Pool(path)
        super().__init__()

    def get_connection_with_tls_context(self, request: Any, verify: Any, proxies: Any = None, cert: Any = None) -> Any:
        """Return the pool of this socket, whatever the URL says."""
        return self._pool

    def request_url(self, request: requests.PreparedRequest, proxies: Any) -> str:
        """Return the path alone."""
        return request.path_url

    def close(self) -> None:
        """Close the pool."""
        self._pool.close()
        super().close()


def session(path: Path) -> requests.Session:
    """Return a session whose requests go to this socket."""
    made = requests.Session()
    made.trust_env = False
    made.mount("http://", _Adapter(path))
    return made
