"""A scripted worker: a thread that speaks the worker's side of the channel and does what a test says."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gevent
from gevent.socket import wait_read

from broker.protocol.frames import Blob, dump_frame, read_frame
from broker.protocol.messages import CallState, ErrorInfo, ExecutionResult, Outcome, ToolCallRequest, ToolCallStatus
from broker.spawner import Peer, Spawned
from broker.testing.plane_client import PlaneClient

JsonObject = dict[str, Any]


class WorkerEnd(Exception):
    """Raised by a script: the worker ends here, for this reason (``oom``, ``crashed(SIGSEGV)``, ``exited(0)``)."""


class FakeExecution:
    """What a script sees of one execution.

    Attributes:
        header: The execute frame's header.
        blobs: Its blobs.
        interrupted: Set once the broker has sent SIGINT.
    """

    def __init__(self, worker: _FakeWorker, header: JsonObject, blobs: Sequence[Blob], output: int) -> None:
        self.header, self.blobs = header, blobs
        self.interrupted = worker.interrupted
        self.output_fd = output
        self._worker = worker
        self._keys = itertools.count(1)

    def print(self, text: str | bytes) -> None:
        """Write to the execution's output."""
        data = text.encode() if isinstance(text, str) else text
        while data:
            data = data[os.write(self.output_fd, data) :]

    def call_tool(self, tool: str, *args: Any, **kwargs: Any) -> ToolCallStatus:
        """Call a tool of the host with values that JSON has; return its outcome."""
        request = ToolCallRequest(
            key=f"{threading.get_ident()}-{next(self._keys)}",
            execution_id=self.header["execution_id"],
            tool=tool,
            args=list(args),
            kwargs=kwargs,
        )
        status, reply, _ = self._worker.guest.request("POST", "/v1/tool-calls", request.to_json())
        while status == 200 and reply["state"] in ("queued", "leased", "started"):
            status, reply, _ = self._worker.guest.request("GET", f"/v1/tool-calls/{reply['call_id']}?wait_s=25")
        if status != 200:
            error = ErrorInfo(type=reply["error"]["code"], message=reply["error"]["message"])
            return ToolCallStatus(call_id="", state=CallState.FAILED, error=error)
        return ToolCallStatus.from_json(reply)

    def send_raw(self, data: bytes) -> None:
        """Write bytes to the channel, frames or not."""
        with contextlib.suppress(OSError):
            self._worker.channel.sendall(data)

    def send_descriptors(self, data: bytes, fds: Sequence[int], *, pieces: int = 1) -> None:
        """Write bytes to the channel with descriptors; in several pieces, with all of them each time."""
        size = max(1, len(data) // pieces)
        for start in range(0, len(data), size):
            with contextlib.suppress(OSError):
                socket.send_fds(self._worker.channel, [data[start : start + size]], fds)

    def send_result(self, result: ExecutionResult, blobs: Sequence[Blob] = (), **changed: Any) -> None:
        """Send a result frame; ``changed`` replaces fields of its header."""
        header = {"type": "result", "execution_id": self.header["execution_id"], **result.to_json(), **changed}
        for piece in dump_frame(header, blobs):
            self.send_raw(bytes(piece))


#: Runs one execution. Returns its result, or a result and the blobs of its value, or None to send nothing.
Script = Callable[[FakeExecution], "ExecutionResult | tuple[ExecutionResult, Sequence[Blob]] | None"]


class _FakeWorker(threading.Thread):
    """The worker's side, on a thread."""

    def __init__(self, script: Script, guest_socket: Path, channel: socket.socket) -> None:
        super().__init__(name="fake-worker", daemon=True)
        self.interrupted = threading.Event()
        self.guest = PlaneClient(guest_socket)
        self.channel = channel
        self.ended: Callable[[str], None] = lambda reason: None
        self.copies: queue.SimpleQueue[_FakeWorker] = queue.SimpleQueue()
        self._script, self._guest_socket = script, guest_socket

    def run(self) -> None:
        reason = "killed"
        try:
            self._send({"type": "ready", "pid": os.getpid()})
            while True:
                header, blobs, output = self._receive()
                if header["type"] == "secrets":
                    self._send({"type": "ready", "pid": os.getpid()})
                elif header["type"] == "fork":
                    copy = _FakeWorker(self._script, self._guest_socket, socket.socket(fileno=output))
                    copy.copies = self.copies
                    self.copies.put(copy)
                    copy.start()
                    self._send({"type": "forked", "not_kept": [], "error": None})
                else:
                    self._run_one(header, blobs, output)
        except WorkerEnd as end:
            reason = str(end)
        except (OSError, EOFError):
            pass
        finally:
            self.channel.close()
            self.guest.close()
            self.ended(reason)

    def _run_one(self, header: JsonObject, blobs: Sequence[Blob], output: int) -> None:
        self.interrupted.clear()
        execution = FakeExecution(self, header, blobs, output)
        try:
            result = self._script(execution)
        finally:
            os.close(output)
        if result is None:
            return
        if isinstance(result, ExecutionResult):
            execution.send_result(result)
        else:
            execution.send_result(*result)

    def _receive(self) -> tuple[JsonObject, Sequence[Blob], int]:
        descriptors: list[int] = []

        def read_exactly(size: int) -> bytes:
            data = bytearray()
            while len(data) < size:
                piece, fds, _, _ = socket.recv_fds(self.channel, size - len(data), 1)
                descriptors.extend(fds)
                if not piece:
                    raise EOFError
                data += piece
            return bytes(data)

        header, blobs = read_frame(read_exactly)
        return header, blobs, descriptors[0] if descriptors else -1

    def _send(self, header: JsonObject) -> None:
        for piece in dump_frame(header):
            self.channel.sendall(piece)


class FakeSpawner:
    """Starts scripted workers. Only one session at a time may call tools: they share the test's own process.

    Args:
        script: What each execution does.
        guest_socket: Where tool calls go.
    """

    def __init__(self, script: Script, guest_socket: Path) -> None:
        self._script, self._guest_socket = script, guest_socket
        self._pids = itertools.count(1)
        self._workers: dict[int, tuple[int, _FakeWorker]] = {}  # by pid, with the slot
        self.swept: list[int] = []

    def spawn(self, slot: int, on_exit: Callable[[str], None]) -> Spawned:
        """Start a thread as the worker of a slot."""
        ours, theirs = socket.socketpair()
        worker = _FakeWorker(self._script, self._guest_socket, theirs)
        pid = self._add(slot, worker, on_exit)
        worker.start()
        return Spawned(pid, ours)

    def adopt(self, slot: int, channel: socket.socket, on_exit: Callable[[str], None]) -> int:
        """Wait for the thread that a worker starts as its copy."""
        wait_read(channel.fileno())
        siblings = next(worker for its_slot, worker in self._workers.values() if its_slot == slot)
        return self._add(slot, siblings.copies.get(), on_exit)

    def interrupt(self, slot: int, pid: int, done: Callable[[], None]) -> None:
        """Set ``FakeExecution.interrupted``."""
        self._workers[pid][1].interrupted.set()
        gevent.get_hub().loop.run_callback(done)

    def end(self, slot: int, pid: int, done: Callable[[], None]) -> None:
        """Cut one worker off."""
        self._cut(pid)
        gevent.get_hub().loop.run_callback(done)

    def sweep(self, slot: int, done: Callable[[bool], None]) -> None:
        """Cut the slot's workers off; their scripts see ``interrupted`` and a closed channel."""
        for pid in [pid for pid, (its_slot, _) in self._workers.items() if its_slot == slot]:
            self._cut(pid)
        self.swept.append(slot)
        gevent.get_hub().loop.run_callback(done, True)

    def memory_bytes(self, pid: int) -> int | None:
        """A thread has no memory of its own."""
        return None

    def slot_of(self, peer: Peer) -> int | None:
        """Return the newest slot."""
        return max((slot for slot, _ in self._workers.values()), default=None)

    def _add(self, slot: int, worker: _FakeWorker, on_exit: Callable[[str], None]) -> int:
        loop = gevent.get_hub().loop

        def ended(reason: str) -> None:
            with contextlib.suppress(ValueError, AttributeError):  # the broker has ended before its worker
                loop.run_callback_threadsafe(on_exit, reason)

        pid = next(self._pids)
        self._workers[pid], worker.ended = (slot, worker), ended
        return pid

    def _cut(self, pid: int) -> None:
        _, worker = self._workers.pop(pid)
        worker.interrupted.set()
        with contextlib.suppress(OSError):
            worker.channel.shutdown(socket.SHUT_RDWR)


def ok(value: Any = None) -> ExecutionResult:
    """Return the result of an execution that went well."""
    return ExecutionResult(outcome=Outcome.OK, value=value)
