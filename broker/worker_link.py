"""A session's worker as the broker sees it: its channel, its output, and the spawner that it came from."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import gevent

from broker.channel import Channel
from broker.errors import SessionStartFailed
from broker.output import Output, OutputPipes
from broker.protocol.blob_file import Blobs
from broker.session import Session
from broker.spawner import WorkerSpawner
from broker.waiting import Bell

JsonObject = dict[str, Any]

#: From the fork to the first frame: imports are done before, so this is for a machine under heavy load.
READY_LIMIT_S = 20.0


class WorkerLink:
    """Implements ``session.Worker`` on a real process.

    Args:
        slot: The session's slot.
        spawner: Where workers come from.
        on_killed: Told that the worker is being killed and its slot swept.
        on_swept: Told whether nothing is left once the worker was killed and its slot swept.
    """

    def __init__(
        self, slot: int, spawner: WorkerSpawner, on_killed: Callable[[], None], on_swept: Callable[[bool], None]
    ) -> None:
        self._slot, self._spawner = slot, spawner
        self._on_killed, self._on_swept = on_killed, on_swept
        self._session: Session | None = None
        self._channel: Channel | None = None
        self._lane: socket.socket | None = None
        self._pipes = OutputPipes(self._overflowed)
        self._ready = False
        self._failure: str | None = None
        self._started = Bell()

    def start(self, secrets: Mapping[str, str] = MappingProxyType({})) -> None:
        """Start the worker and wait until it is ready.

        Args:
            secrets: Set in its environment, where there are any; nothing here keeps them.

        Raises:
            SessionStartFailed: It ended, or did not become ready; the slot is being swept.
        """
        try:
            sock = self._spawner.spawn(self._slot, self._exited)
            channel = self._open(sock)
            self._wait_until_ready()
            if secrets:
                # No generated code has run yet, so the worker is still to be trusted; it says "ready" once more.
                self._ready = False
                channel.send({"type": "secrets", "values": dict(secrets)})
                self._wait_until_ready()
        except SessionStartFailed:
            self.kill()
            raise

    def attach(self, session: Session) -> None:
        """Tell this session from now on what the worker does."""
        self._session = session
        if self._failure is not None:
            session.exited(self._failure)

    def execute(self, header: JsonObject, blobs: Blobs, *, max_output_bytes: int) -> None:
        """Send an execute frame, with a fresh output pipe unless the one before is still the worker's alone."""
        assert self._channel is not None
        if self._pipes.reopen(max_output_bytes):
            self._channel.send({**header, "pipe": "kept"}, blobs)
            return
        pipe = self._pipes.open(max_output_bytes)
        self._channel.send({**header, "pipe": "new"}, blobs, fd=pipe.write_end)
        pipe.close_write_end()
        gevent.get_hub().loop.run_callback(self._pipes.prepare)  # while the worker works

    def leave_to_lane(self, *, max_output_bytes: int) -> bool:
        """See ``session.Worker.leave_to_lane``: only where the output pipe was kept, which the worker has then."""
        return self._lane is not None and self._pipes.reopen(max_output_bytes, watch=False)

    def execute_left(self, header: JsonObject, blobs: Blobs) -> None:
        """See ``session.Worker.execute_left``."""
        assert self._channel is not None
        self._pipes.watch()
        self._channel.send({**header, "pipe": "kept"}, blobs)

    def open_lane(self) -> socket.socket:
        """Give the worker one end of a socket pair, and return the other one, for the host; the lane before it ends.

        Ours is a duplicate, with which the lane can be ended whoever holds the other.
        """
        assert self._channel is not None
        self._shut_lane()  # without a word: the worker takes the new one in its place
        hosts, workers = socket.socketpair()
        with workers:
            self._channel.send({"type": "lane"}, fd=workers.fileno())
        self._lane = hosts.dup()
        return hosts

    def close_lane(self) -> None:
        """End the lane. Idempotent.

        The worker looks at the channel first: what is left in the lane, and was not announced in time, never runs.
        """
        if self._lane is not None and self._channel is not None:
            self._channel.tell({"type": "lane"})
        self._shut_lane()

    def _shut_lane(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            with contextlib.suppress(OSError):
                lane.shutdown(socket.SHUT_RDWR)
            lane.close()

    def read_now(self) -> None:
        """Take in what the worker has sent."""
        if self._channel is not None:
            self._channel.read_now()

    def interrupt(self) -> None:
        """Send SIGINT to the worker."""
        self._spawner.interrupt(self._slot, self._interrupted)

    def take_output(self, *, keep: bool) -> Output:
        """Return what the execution printed, up to now."""
        return self._pipes.take(keep=keep)

    def leave_output(self) -> None:
        """See ``session.Worker.leave_output``."""
        self._pipes.leave()

    def kill(self) -> None:
        """Kill every process of the session and remove its files."""
        self._on_killed()
        self.close_lane()
        if self._channel is not None:
            self._channel.close()
        self._pipes.close()
        self._spawner.sweep(self._slot, self._on_swept)

    def _open(self, sock: socket.socket) -> Channel:
        self._channel = Channel(sock, on_frame=self._frame, on_broken=self._broken, on_closed=self._closed)
        return self._channel

    def _wait_until_ready(self) -> None:
        settled = self._started.wait_until(lambda: self._ready or self._failure is not None, READY_LIMIT_S)
        if not settled:
            raise SessionStartFailed(f"the worker was not ready within {READY_LIMIT_S:g} s")
        if self._failure is not None:
            raise SessionStartFailed(f"the worker ended while it started: {self._failure}")

    def _frame(self, header: JsonObject, blobs: Blobs) -> None:
        if self._session is not None:
            self._session.frame_received(header, blobs)
        elif header.get("type") == "ready":
            self._ready = True
            self._started.ring()

    def _exited(self, reason: str) -> None:
        if self._channel is not None:
            self._channel.read_now()  # its last words count
        self._fail(reason)
        if self._session is not None:
            self._session.exited(reason)

    def _broken(self) -> None:
        self._fail("protocol")
        if self._session is not None:
            self._session.protocol_broken()

    def _closed(self) -> None:
        if self._session is not None:
            self._session.channel_closed()

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            self._failure = reason
            self._started.ring()

    def _interrupted(self) -> None:
        if self._session is not None:
            self._session.interrupt_delivered()

    def _overflowed(self) -> None:
        if self._session is not None:
            self._session.output_overflowed()
