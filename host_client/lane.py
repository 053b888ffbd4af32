"""The lane: executions straight to the worker, past the broker, which is told of each at the same time.

The broker keeps its record, deadline and stored reply of every execution. It is out of the way only of those that are
over in a moment and leave nothing but a value and a little output: their result comes from the worker itself.
Everything else (much output, an end that takes longer) comes from the broker as always, on the connection on which it
was told. See ``docs/decisions/021-the-lane.md``.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from broker.protocol import limits
from broker.protocol.blob_file import BlobFile, rights
from broker.protocol.frames import Blob, FrameAssembler, FrameError, dump_frame
from broker.protocol.spinner import Spinner
from host_client.http_wire import Exchange

#: Of the worker's frames; it sends no larger ones.
_MOST_REPLY_BYTES = 128 << 10
#: Frames of the worker that are not asked for, within one execution. One or two may be late.
_MOST_STRAY_FRAMES = 16
#: With a deadline nearer than this the broker may be about to interrupt what the worker calls ended.
LEAST_TIMEOUT_S = 1.0
_READ_BYTES = 64 << 10
#: The worker says nothing on the lane after ``limits.LANE_REPLY_S``; much later than that its word is stale.
_TRUSTED_S = LEAST_TIMEOUT_S / 2

#: Within which code that waits for an answer reads from the lane; threads that wait for each other may take a while.
_READ_WITHIN_S = 1.0

#: Of executions in this process: where more are under way, whoever spins takes the interpreter lock from the others.
_MOST_SPINNERS = 2
_under_way: set[int] = set()

Frame = tuple[dict[str, Any], Sequence[Blob]]


class LaneBroken(ConnectionError):
    """The lane is of no more use; the broker knows what was announced, and is asked again."""


class Lane:
    """One session's lane, and the connection to the broker that goes with it. For one thread at a time.

    Args:
        exchange: Upgraded; the broker serves what is announced here one after the other.
        sock: The lane.

    Attributes:
        pid: Of the process whose lane it is: after a fork it is the parent's.
    """

    def __init__(self, exchange: Exchange, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._exchange, self._sock = exchange, sock
        self._frames = FrameAssembler(_MOST_REPLY_BYTES)
        self._strays = 0
        # Whether the running execution has called a tool: then its end comes later than its first word did.
        self._called = False
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._poll.register(exchange.fileno(), select.POLLIN)
        self._for_word, self._for_end = Spinner(moves=True), Spinner()
        self._writable = select.poll()
        self._writable.register(sock.fileno(), select.POLLOUT)
        self.pid = os.getpid()
        # Held while something is sent, and by close(): tools answer from threads of their own. Reentrant, because the
        # garbage collector may close the session in any thread, also in one that is in here.
        self._telling = threading.RLock()
        self._closed = False

    @classmethod
    def open(cls, exchange: Exchange, path: str) -> Lane | None:
        """Ask the broker for a lane on a connection that nobody else uses; None where it has none to give.

        Raises:
            OSError, BadReply, FrameError: The connection is of no more use.
        """
        exchange.send_frame(dump_frame({"request": f"POST {path}", "body": {}}))
        header, fd = exchange.receive_descriptor()
        if fd is None or header.get("status") != 200:
            if fd is not None:
                os.close(fd)
            return None
        return cls(exchange, socket.socket(fileno=fd))

    def close(self) -> None:
        """Close both connections: the broker takes in hand what it was told and has not seen the end of."""
        if self.pid != os.getpid():  # after a fork: copies; the lock may be held by a thread that is not here
            self._close()
            return
        with self._telling:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # the broker holds a duplicate
            self._close()

    def _close(self) -> None:
        self._closed = True
        self._exchange.close()
        self._sock.close()

    def run(
        self,
        announcement: Sequence[Blob],
        execution: Sequence[Blob],
        file: BlobFile | None,
        execution_id: str,
        timeout_s: float,
        on_frame: Callable[[dict[str, Any], Sequence[Blob]], bool],
        on_call: Callable[[dict[str, Any], int], None],
    ) -> tuple[dict[str, Any], Sequence[Blob], float] | None:
        """Tell broker and worker of an execution, and wait until one of them answers.

        Args:
            announcement: The broker's frame; sent first, so that the broker can read of it before it hears of it.
            execution: The worker's.
            file: The blobs of both, or None; it is closed when it was sent.
            execution_id: Of the execution.
            timeout_s: For the whole exchange, in seconds.
            on_frame: Takes each reply of the broker; tells whether it was the last one.
            on_call: Takes each tool call of the worker, and its size in bytes.

        Returns:
            The worker's result, its blobs and how many seconds it took; None where the broker has answered.

        Raises:
            TimeoutError: Nobody answered in time.
            OSError, BadReply, FrameError: The lane is of no more use; whoever posts the same execution again gets its
                end.
        """
        began = time.monotonic()
        self._strays, self._called = 0, False
        self._exchange.begin(timeout_s)
        with self._telling:
            self._exchange.send_frame(announcement, None if file is None else file.fd)
            self._send(execution, file)
        if file is not None:
            file.close()  # now: whoever closes it last frees its pages, and shall not be the one who waits
        _under_way.add(id(self))
        try:
            return self._result(execution_id, began, timeout_s, on_frame, on_call)
        finally:
            _under_way.discard(id(self))

    def _result(
        self,
        execution_id: str,
        began: float,
        timeout_s: float,
        on_frame: Callable[[dict[str, Any], Sequence[Blob]], bool],
        on_call: Callable[[dict[str, Any], int], None],
    ) -> tuple[dict[str, Any], Sequence[Blob], float] | None:
        while True:
            left_s = began + timeout_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("no answer in time")
            spinner = self._for_end if self._called else self._for_word
            ready = spinner.wait(self._poll, left_s, spins=len(_under_way) <= _MOST_SPINNERS)
            # The broker first: where the lane has broken, no claim that has come is left lying.
            if self._exchange.fileno() in ready and self._replies(execution_id, on_frame):
                return None
            if self._sock.fileno() in ready:
                found = self._read(execution_id, on_call)
                took_s = time.monotonic() - began
                if found is not None and took_s >= _TRUSTED_S:
                    raise LaneBroken("the worker's word came late")
                if found is not None:
                    return (*found, took_s)

    def take_calls(self, execution_id: str, on_call: Callable[[dict[str, Any], int], None]) -> None:
        """Take what the worker has sent and nobody has read, before the lane is closed while the code runs."""
        with contextlib.suppress(OSError, FrameError):
            self._read(execution_id, on_call)

    def answer(self, aside: Sequence[Blob], answer: Sequence[Blob]) -> bool:
        """Tell broker, then worker, of a tool call's answer; from any thread.

        Args:
            aside: The broker's frame.
            answer: The worker's.

        Returns:
            Whether the broker was told; the worker asks it where the lane does not bring the answer.
        """
        with self._telling:
            if self._closed or not self._exchange.send_at_once(b"".join(aside)):
                return False
            self._send_soon(answer)
            return True

    def tell(self, frame: Sequence[Blob]) -> None:
        """Tell the worker something; from any thread."""
        with self._telling:
            if not self._closed:
                self._send_soon(frame)

    def _replies(self, execution_id: str, on_frame: Callable[[dict[str, Any], Sequence[Blob]], bool]) -> bool:
        """Take what the broker has sent, which may be more than one reply; tell whether the last one was among it."""
        while not self._reply(execution_id, on_frame):
            if not self._exchange.has_more:
                return False
        self._exchange.check_end()
        return True

    def _reply(self, execution_id: str, on_frame: Callable[[dict[str, Any], Sequence[Blob]], bool]) -> bool:
        header, blobs = self._exchange.receive_frame(max_bytes=limits.MAX_TOOL_CALL_BYTES)
        body = header.get("body")
        if header.get("status") == 200 and isinstance(body, dict) and body.get("execution_id") != execution_id:
            return False  # late word of the one before, which the worker had answered
        return on_frame(header, blobs)

    def _send(self, execution: Sequence[Blob], file: BlobFile | None) -> None:
        frame = b"".join(execution)
        sent = self._sock.send(frame) if file is None else self._sock.sendmsg([frame], rights([file.fd]))
        if sent != len(frame):
            raise LaneBroken("the worker takes nothing")

    def _send_soon(self, frame: Sequence[Blob]) -> None:
        """Send while code runs, which may be slow to read; end the lane where it does not read at all."""
        joined = b"".join(frame)
        with contextlib.suppress(OSError):
            if self._writable.poll(_READ_WITHIN_S * 1000) and self._sock.send(joined) == len(joined):
                return
            self._sock.shutdown(socket.SHUT_RDWR)  # whoever waits for this asks the broker then

    def _read(self, execution_id: str, on_call: Callable[[dict[str, Any], int], None]) -> Frame | None:
        """Return the worker's result of this execution if it is there; what else it sends is thrown away.

        Its tool calls are for ``on_call``.
        """
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return None
        if not data:
            raise LaneBroken("the worker, or the broker, has closed it")
        self._frames.add(data)
        while (frame := self._frames.next()) is not None:
            if frame[0].get("execution_id") == execution_id:
                if frame[0].get("type") != "call":
                    return frame
                self._called = True
                on_call(frame[0], self._frames.size)
                continue
            self._strays += 1
            if self._strays > _MOST_STRAY_FRAMES:
                raise LaneBroken("the worker says what it was not asked")
        return None
