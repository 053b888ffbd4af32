"""The broker daemon: both planes on their sockets, and how long it lives."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import gevent
from gevent.event import Event

from broker.errors import BrokerError, TooManyCalls
from broker.framed import FramedConnection, guest_routes, host_routes
from broker.guest_api import make_guest_app
from broker.host_api import make_host_app
from broker.logs import Log
from broker.protocol import fast_json, limits
from broker.protocol.frames import FILES_UPGRADE, FRAMED_UPGRADE, dump_frame
from broker.protocol.self_test import SelfTest
from broker.sessions import Sessions
from broker.spawner import Peer, WorkerSpawner
from broker.supervisor.config import SupervisorConfig
from broker.tool_calls import Clock
from broker.unix_server import Connection, UnixServer, only_uids

#: Connections of one session's processes. Each blocked wrapper holds one; without a bound they would take every
#: file descriptor of the broker and shut the host out.
MAX_GUEST_CONNECTIONS = 4096


class Linger:
    """Ends the sandbox when no host has been connected for a while: a host that was killed closes its sockets.

    Args:
        linger_s: For how long, or None for ever.
        over: Called once then.
    """

    def __init__(self, linger_s: float | None, over: Callable[[], None]) -> None:
        self._linger_s, self._over = linger_s, over
        self._connected = 0
        self._timer: gevent.Greenlet | None = None
        self._wait()

    def connected(self) -> None:
        """A host has connected."""
        self._connected += 1
        if self._timer is not None:
            self._timer.kill(block=False)
            self._timer = None

    def disconnected(self) -> None:
        """A host has disconnected."""
        self._connected -= 1
        if not self._connected:
            self._wait()

    def close(self) -> None:
        """Stop watching."""
        self._linger_s = None
        if self._timer is not None:
            self._timer.kill(block=False)

    def _wait(self) -> None:
        if self._linger_s is not None:
            self._timer = gevent.spawn_later(self._linger_s, self._over)


class Daemon:
    """Serves until ``stop`` is called or no host is left.

    Args:
        config: Paths, limits, name.
        spawner: Where workers come from.
        log: For events.
        allowed_host_uids: Who may speak on the host's socket.
        clock: Monotonic seconds.
        self_test: Returns what the sandbox found out about itself; may wait for it.
    """

    def __init__(
        self,
        config: SupervisorConfig,
        spawner: WorkerSpawner,
        *,
        log: Log,
        allowed_host_uids: frozenset[int],
        clock: Clock = time.monotonic,
        self_test: Callable[[], SelfTest] = SelfTest,
    ) -> None:
        fast_json.use()
        self._log = log
        self._stopped = Event()
        self._guests: Counter[int] = Counter()
        self._allow_host = only_uids(allowed_host_uids)
        self.sessions = Sessions(spawner, max_sessions=config.max_sessions, log=log, clock=clock)
        self.host_app = make_host_app(
            self.sessions,
            log,
            name=config.name,
            connections=lambda: self._servers[-1].living_connections(),
            self_test=self_test,
        )
        self.guest_app = make_guest_app(self.sessions, log)
        self._linger = Linger(config.linger_s, self._nobody_left)
        self._servers = [
            UnixServer(
                config.guest_socket,
                0o666,
                self.guest_app,
                log=log,
                admit=self._admit_guest,
                left=self._guest_left,
                upgrades={
                    FRAMED_UPGRADE: self._serve_guest,
                    FILES_UPGRADE: lambda sock, connection: self._serve_guest(sock, connection, files=True),
                },
            ),
            # Last: a host that reaches this one finds everything in place.
            UnixServer(
                config.host_socket,
                0o600,
                self.host_app,
                log=log,
                admit=self._admit_host,
                left=self._host_left,
                upgrades={
                    FRAMED_UPGRADE: self._serve_host,
                    FILES_UPGRADE: lambda sock, connection: self._serve_host(sock, connection, files=True),
                },
            ),
        ]

    def start(self) -> None:
        """Accept connections from now on."""
        for server in self._servers:
            server.start()
        self._log.event("serving")

    def serve(self) -> None:
        """Serve; return after ``stop``. Sessions are closed then."""
        try:
            self._stopped.wait()
        finally:
            self._linger.close()
            for session in self.sessions:
                session.close()
            for server in self._servers:
                server.close_all()
            self._log.event("ended")

    def stop(self) -> None:
        """Let ``serve`` return."""
        self._stopped.set()

    def _serve_host(self, sock: Any, connection: Connection, *, files: bool = False) -> None:
        most = limits.MAX_FRAME_BYTES if files else 0
        FramedConnection(sock, connection, host_routes(self.sessions), self._log, max_file_bytes=most).serve()

    def _serve_guest(self, sock: Any, connection: Connection, *, files: bool = False) -> None:
        try:
            family = self.sessions.of_guest(connection.peer)
        except BrokerError as error:
            sock.sendall(b"".join(dump_frame({"status": error.status, "body": error.to_json()})))
            return
        FramedConnection(
            sock,
            connection,
            guest_routes(family),
            self._log,
            max_bytes=limits.MAX_GUEST_FRAME_BYTES,
            max_file_bytes=limits.MAX_TOOL_CALL_BYTES if files else 0,
            whole=True,
        ).serve()

    def _admit_host(self, peer: Peer) -> None:
        self._allow_host(peer)
        self._linger.connected()

    def _host_left(self, peer: Peer) -> None:
        self._linger.disconnected()

    def _admit_guest(self, peer: Peer) -> None:
        if self._guests[peer.uid] >= MAX_GUEST_CONNECTIONS:
            raise TooManyCalls(f"{MAX_GUEST_CONNECTIONS} connections are open already")
        self._guests[peer.uid] += 1

    def _guest_left(self, peer: Peer) -> None:
        self._guests[peer.uid] -= 1

    def _nobody_left(self) -> None:
        self._log.event("no_host_left")
        self.stop()
