"""PID 1's side of the zygote: starts it, starts it anew where it has ended, and speaks to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import Any

from broker.supervisor import link
from broker.supervisor.config import SupervisorConfig


class Nursery:
    """At most one zygote.

    Args:
        config: The supervisor's.
    """

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self._sock: socket.socket | None = None
        self.pid: int | None = None
        self.loading: str | None = None

    def start(self, broker_pid: int | None = None, *, self_test: bool = False) -> socket.socket:
        """Fork a zygote, and return what becomes readable when it has something to say.

        Args:
            broker_pid: For its self-test, or None where the broker is in another pid namespace.
            self_test: Whether it looks at the boundary first.

        Raises:
            OSError: No process is to be had.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid = os.fork()
            if pid == 0:
                # Only there: PID 1 stays small.
                from broker.supervisor.zygote import run_zygote

                run_zygote(self._config, theirs, broker_pid, self_test=self_test)
        self._sock, self.pid, self.loading = ours, pid, None
        return ours

    @property
    def sock(self) -> socket.socket | None:
        """The connection, or None where there is no zygote."""
        return self._sock

    def ask(self, message: dict[str, Any]) -> None:
        """Send a message; a zygote that has ended never answers, which ``receive`` tells."""
        assert self._sock is not None
        with contextlib.suppress(OSError):
            link.send(self._sock, message)

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """Return the next message, or None at the zygote's end: it is forgotten then, and can be started anew."""
        assert self._sock is not None
        received = link.receive(self._sock)
        if received is None:
            self._sock.close()
            self._sock = None
        elif "loading" in received[0]:
            self.loading = received[0]["loading"]
        return received

    def kill(self) -> None:
        """End the zygote, and with it every worker."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
