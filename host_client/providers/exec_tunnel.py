"""Connections to a broker whose socket cannot be shared: through a relay that the engine runs in its sandbox.

One relay carries all connections that a process has to one sandbox: each would cost another 70 ms and some megabytes
of the sandbox's memory. See ``docs/decisions/019-exec-transport.md``.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from broker.protocol.tunnel import HELLO, Tunnel, TunnelBroken
from host_client.errors import SandboxError
from host_client.providers.base import SandboxHandle
from host_client.providers.container_spec import EXEC, HOST_SOCKET_DIR
from host_client.providers.engine_api import Engine
from host_client.providers.exec_stream import ExecStream
from host_client.runtime_dir import SOCKET_NAME, broker_uid
from host_client.transport import SocketTransport, UnixSocketTransport

log = logging.getLogger(__name__)

#: The engine takes a tenth of a second to start a program; a busy machine many times that.
REOPEN_TIMEOUT_S = 20.0
RELAY_COMMAND = ("python3", "-s", "-S", "-P", "-m", "broker.relay", f"{HOST_SOCKET_DIR}/{SOCKET_NAME}")


class RelayEnded(ConnectionRefusedError):
    """The relay ended, or never began; the text is what it said."""


class Line:
    """A process's way into one sandbox. Safe to share between threads; a forked child gets a relay of its own.

    Args:
        container_id: The sandbox.
        connect: Returns the engine.
        on_close: Called when nobody uses it any more.
    """

    def __init__(
        self, container_id: str, connect: Callable[[], Engine], on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._container_id, self._connect, self._on_close = container_id, connect, on_close
        # Guards _tunnel: of many threads that find it gone, one opens the next.
        self._lock = threading.Lock()
        # Guards _users.
        self._counting = threading.Lock()
        self._tunnel: _Running | None = None
        self._pid = os.getpid()
        self._users = 0

    def dial(self, timeout_s: float) -> socket.socket:
        """Return a new connection to the broker. The relay is started where none runs (any more).

        Args:
            timeout_s: For starting it: also for the broker to come up.

        Raises:
            RelayEnded: It cannot be started: the sandbox, or the broker, is gone.
            OSError: Another failure on the way; ``TimeoutError``.
        """
        self._forget_parent()
        for _ in range(2):  # the one that was found may end before it was asked
            tunnel = self._tunnel
            if tunnel is None or tunnel.ended:
                tunnel = self._opened(timeout_s)
            try:
                return tunnel.open()
            except ConnectionRefusedError as error:
                refused = error
        raise refused

    def use(self) -> Line:
        """Note one more user."""
        self._forget_parent()
        with self._counting:
            self._users += 1
        return self

    def let_go(self) -> None:
        """Note that a user is done; the last one ends the relay."""
        self._forget_parent()
        with self._counting:
            self._users -= 1
            last = not self._users
        if last:
            self.close()
            self._on_close()

    def close(self) -> None:
        """End the relay, and with it every connection through it."""
        self._forget_parent()
        tunnel, self._tunnel = self._tunnel, None
        if tunnel is not None:
            tunnel.close()

    def _forget_parent(self) -> None:
        """In a forked child: the tunnel, its thread and whoever holds the locks are the parent's."""
        if self._pid != os.getpid():
            self._tunnel, self._pid = None, os.getpid()
            self._lock, self._counting = threading.Lock(), threading.Lock()

    def _opened(self, timeout_s: float) -> _Running:
        with self._lock:
            if self._tunnel is None or self._tunnel.ended:
                self._tunnel = _start(self._connect, self._container_id, timeout_s)
            return self._tunnel


def exec_transport(line: Line) -> SocketTransport:
    """Return a transport over a line, which has one user less when it is closed."""
    # No descriptor passes through a stream of bytes.
    return SocketTransport(
        line.dial, files=False, connect_timeout_s=REOPEN_TIMEOUT_S, on_close=line.let_go, can_resume=True
    )


def transport_by(engine: Engine, handle: SandboxHandle) -> SocketTransport:
    """Return a transport to a sandbox for a question or two, where a relay's start is no matter.

    Args:
        engine: Stays connected until the transport is closed.
        handle: The sandbox.
    """
    if handle.transport != EXEC:
        return UnixSocketTransport(handle.socket_path)
    return exec_transport(Line(handle.sandbox_id, lambda: engine).use())


class Lines:
    """The lines of one process, by sandbox.

    Args:
        connect: Returns the engine.
    """

    def __init__(self, connect: Callable[[], Engine]) -> None:
        self._connect = connect
        # Guards _lines: a sandbox has at most one.
        self._lock = threading.Lock()
        self._lines: dict[str, Line] = {}

    def to(self, container_id: str) -> Line:
        """Return the line to a sandbox, with one more user."""
        with self._lock:
            line = self._lines.get(container_id)
            if line is None:
                line = Line(container_id, self._connect, lambda: self._forget(container_id))
                self._lines[container_id] = line
            return line.use()

    def close(self, container_id: str) -> None:
        """Close the line to a sandbox that is no more, whoever uses it."""
        with self._lock:
            line = self._lines.pop(container_id, None)
        if line is not None:
            line.close()

    def _forget(self, container_id: str) -> None:
        with self._lock:
            self._lines.pop(container_id, None)


class _Running(Tunnel):
    """A tunnel with the thread that runs it."""

    def __init__(self, stream: ExecStream, name: str) -> None:
        super().__init__(stream)
        self._exec = stream
        threading.Thread(target=self._carry, name=f"relay-{name}", daemon=True).start()

    def _carry(self) -> None:
        try:
            self.run()
            said = self._exec.complaints()
            log.debug("the relay ended%s", f": {said}" if said else "")
        except TunnelBroken as error:
            log.warning("a sandbox's relay broke the protocol and was cut off: %s", error)
        except OSError as error:
            log.debug("the relay's connection broke: %s", error)
        finally:
            self._exec.close()


def _start(connect: Callable[[], Engine], container_id: str, timeout_s: float) -> _Running:
    uid = broker_uid()
    began = time.monotonic()
    try:
        engine = connect()
        try:
            stream = engine.open_exec(container_id, RELAY_COMMAND, user=f"{uid}:{uid}")
        finally:
            engine.close()
    except SandboxError as error:
        raise RelayEnded(error.message) from error
    try:
        said = stream.read_line(timeout_s=timeout_s)
        if said != HELLO:
            raise RelayEnded(f"the relay did not start: {stream.complaints(said)}")
    except EOFError as ended:
        stream.close()
        raise RelayEnded(f"the relay ended at its start: {ended}") from None
    except BaseException:
        stream.close()
        raise
    log.debug("a relay runs in %s after %.0f ms", container_id[:12], 1000 * (time.monotonic() - began))
    return _Running(stream, container_id[:12])
