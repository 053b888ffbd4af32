"""A session's worker as the broker sees it: its channel, its output, and the spawner that it came from."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import gevent

from broker.channel import Channel
from broker.errors import ForkFailed, SessionBusy, SessionStartFailed
from broker.lull import Bell
from broker.output import Output, OutputPipes
from broker.protocol.blob_file import Blobs
from broker.session import EXIT_REASON_WAIT_S, Session
from broker.spawner import WorkerSpawner
from broker.waiting import Bell as WaitingBell

JsonObject = dict[str, Any]

#: From the fork to the first frame: imports are done before, so this is for a machine under heavy load.
READY_LIMIT_S = 20.0

#: From the copy's first word, or its failure, to the worker's own.
_FORKED_LIMIT_S = 5.0
#: What a worker, whose word it is, may say that its copy lacks.
_MOST_NAMES, _MOST_NAME_CHARS = 1_000, 200


class WorkerLink:
    """Implements ``session.Worker`` on a real process.

    Args:
        slot: The session's slot.
        spawner: Where workers come from.
        on_killed: Told that this worker is to be ended.

    Attributes:
        pid: The worker's, once it is known.
    """

    def __init__(self, slot: int, spawner: WorkerSpawner, on_killed: Callable[[WorkerLink], None]) -> None:
        self._slot, self._spawner, self._on_killed = slot, spawner, on_killed
        self.pid: int | None = None
        self._session: Session | None = None
        self._channel: Channel | None = None
        self._lane: socket.socket | None = None
        self._pipes = OutputPipes(self._overflowed)
        self._ready = False
        self._failure: str | None = None
        self._started = WaitingBell()
        # Set while the worker forks: its answer, once it is there.
        self._fork: list[JsonObject] | None = None
        self._watcher: Callable[[str], None] | None = None
        self._parent: WorkerLink | None = None
        # Pids of its copies, and of those that have ended since its last fork: they are its children.
        self._copies: set[int] = set()
        self._ended_copies: list[int] = []

    def start(self, secrets: Mapping[str, str] = MappingProxyType({})) -> None:
        """Start the worker and wait until it is ready.

        Args:
            secrets: Set in its environment, where there are any; nothing here keeps them.

        Raises:
            SessionStartFailed: It ended, or did not become ready; the slot is being swept.
        """
        try:
            spawned = self._spawner.spawn(self._slot, self._exited)
            self.pid = spawned.pid
            channel = self._open(spawned.channel)
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

    def watch(self, on_end: Callable[[str], None]) -> None:
        """Tell why the worker ended, where no session is told."""
        self._watcher = on_end
        if self._failure is not None:
            on_end(self._failure)

    def copy_to(self, copy: WorkerLink) -> tuple[str, ...]:
        """Let the worker fork, and wait until its copy is ready.

        Args:
            copy: Leads to the copy from now on; it is killed where that fails.

        Returns:
            Names of what the copy lacks.

        Raises:
            ForkFailed: There is no copy.
        """
        assert self._channel is not None
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # the kernel tells who the copy is
        self._fork = []
        try:
            with theirs:
                ended, self._ended_copies = self._ended_copies, []
                self._channel.send(
                    {"type": "fork", "copies": sorted(self._copies), "ended": ended}, fds=[theirs.fileno()]
                )
            failure = copy.adopt(ours, self)
            return self._forked(failure)
        except BaseException:
            copy.kill()
            raise
        finally:
            self._fork = None

    def gone(self) -> None:
        """Note that the process has ended: the one that it was forked from is to reap it."""
        parent, pid = self._parent, self.pid
        if parent is not None and pid is not None:
            parent._copies.discard(pid)
            parent._ended_copies.append(pid)

    def adopt(self, channel: socket.socket, parent: WorkerLink) -> ForkFailed | None:
        """Serve a copy that is being forked from another one, from its first word on; return what went wrong."""
        try:
            self.pid = self._spawner.adopt(self._slot, channel, self._exited)
        except ForkFailed as failure:
            channel.close()
            return failure
        self._parent = parent
        parent._copies.add(self.pid)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        self._open(channel)
        try:
            self._wait_until_ready()
        except SessionStartFailed as failure:
            return ForkFailed(failure.message)
        return None

    def _forked(self, failure: ForkFailed | None) -> tuple[str, ...]:
        """Wait for the worker's own word on the fork, which knows best why there is none."""
        answers = self._fork
        assert answers is not None
        self._started.wait_until(lambda: bool(answers) or self._failure is not None, _FORKED_LIMIT_S)
        answer = answers[0] if answers else {}
        error, names = answer.get("error"), answer.get("not_kept")
        if isinstance(error, str):
            raise ForkFailed(f"the session could not be forked: {error[:_MOST_NAME_CHARS]}")
        if failure is not None:
            raise failure
        if not isinstance(names, list) or len(names) > _MOST_NAMES:
            raise ForkFailed("the session's answer to the fork makes no sense")
        return tuple(str(name)[:_MOST_NAME_CHARS] for name in names)

    def execute(self, header: JsonObject, blobs: Blobs, *, max_output_bytes: int) -> None:
        """Send an execute frame, with a fresh output pipe unless the one before is still the worker's alone."""
        assert self._channel is not None
        if self._pipes.reopen(max_output_bytes):
            self._channel.send({**header, "pipe": "kept"}, blobs)
            return
        pipe = self._pipes.open(max_output_bytes)
        self._channel.send({**header, "pipe": "new", "reader": True}, blobs, fds=[pipe.write_end, pipe.second_read_end])
        pipe.close_workers_ends()
        gevent.get_hub().loop.run_callback(self._pipes.prepare)  # while the worker works

    def leave_to_lane(self, *, max_output_bytes: int) -> bool:
        """See ``session.Worker.leave_to_lane``: only where the output pipe was kept, which the worker has then."""
        return self._lane is not None and self._pipes.reopen(max_output_bytes, watch=False)

    def execute_left(self, header: JsonObject, blobs: Blobs) -> None:
        """See ``session.Worker.execute_left``."""
        assert self._channel is not None
        self._pipes.watch()
        self._channel.send({**header, "pipe": "kept"}, blobs)

    def open_lane(self, bell: Bell) -> socket.socket:
        """Give the worker one end of a socket pair, and return the other one, for the host; the lane before it ends.

        Ours is a duplicate, with which the lane can be ended whoever holds the other.

        Args:
            bell: For the worker, to ring where it has told us what it has not told the host.
        """
        assert self._channel is not None
        if self._channel.full:
            raise SessionBusy("the worker has not read yet what it was sent")
        self._shut_lane()  # without a word: the worker takes the new one in its place
        hosts, workers = socket.socketpair()
        with workers:
            self._channel.send({"type": "lane", "fd": True, "bell": True}, fds=[workers.fileno(), bell.fileno()])
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

    def read_now(self) -> bool:
        """Take in what the worker has sent; tell whether that was anything."""
        return self._channel is not None and self._channel.read_now()

    def attend(self, wanted: bool) -> None:
        """See ``lull.Line.attend``."""
        if self._channel is not None:
            self._channel.attend(wanted)

    def interrupt(self) -> None:
        """Send SIGINT to the worker."""
        assert self.pid is not None
        self._spawner.interrupt(self._slot, self.pid, self._interrupted)

    def take_output(self, rest: str, *, keep: bool) -> Output:
        """See ``session.Worker.take_output``."""
        return self._pipes.take(rest, keep=keep)

    def leave_output(self, printed: str) -> Output:
        """See ``session.Worker.leave_output``."""
        return self._pipes.leave(printed)

    def kill(self) -> None:
        """End the worker; with the last one of its family every process and file of theirs. Idempotent."""
        self._session = self._watcher = None
        self._shut_lane()
        if self._channel is not None:
            self._channel.close()
        self._pipes.close()
        self._on_killed(self)

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
        if self._fork is not None and header.get("type") == "forked":
            self._fork.append(header)
            self._started.ring()
        elif self._session is not None:
            self._session.frame_received(header, blobs, 0 if self._channel is None else self._channel.frame_size)
        elif header.get("type") == "ready" and not self._ready:
            self._ready = True
            self._started.ring()
        else:
            self._broken()  # it has nothing to say yet

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
        elif self._ready:
            gevent.spawn_later(EXIT_REASON_WAIT_S, self._fail, "protocol")  # the reason comes sooner

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            self._failure = reason
            self._started.ring()
            if self._watcher is not None:
                self._watcher(reason)

    def _interrupted(self) -> None:
        if self._session is not None:
            self._session.interrupt_delivered()

    def _overflowed(self) -> None:
        if self._session is not None:
            self._session.output_overflowed()
