"""A real worker process with its channel and output pipe, and a small real guest plane for it to call."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from broker.protocol import frames
from broker.protocol.blob_file import BlobFile
from broker.protocol.messages import ToolDefinition, ToolParameter
from broker.protocol.values import Decoder, Encoder

ROOT = Path(__file__).resolve().parents[3]
# Far above what anything here takes; a test that waits so long has failed.
PATIENCE_S = 30.0
# CPython checks for signals before it blocks, not while it begins to: a SIGINT that strikes just between waits for the
# next one. So it has to be sent again to a worker that does not react.
REMINDER_S = 1.0

# As the supervisor does it: no interpreter exit after run(), so that leftover threads hold nothing up.
_CHILD = """
import os, socket, sys
try:
    import coverage
    coverage.process_startup()
    measured = coverage.Coverage.current()
except ImportError:
    measured = None
from broker.worker.main import run
run(socket.socket(fileno=int(sys.argv[1])), guest_socket=sys.argv[2])
if measured is not None:
    measured.stop()
    measured.save()
os._exit(0)
"""


@dataclasses.dataclass
class Result:
    """A result frame, its value decoded, and what came out of the pipe."""

    outcome: str
    value: Any
    display: str | None
    error: dict[str, Any] | None
    output: str

    @property
    def message(self) -> str:
        assert self.error is not None, self
        return str(self.error["message"])


class Running:
    """An execution that has been sent."""

    def __init__(self, worker: WorkerProcess, execution_id: str, pipe: int) -> None:
        self._worker = worker
        self._execution_id = execution_id
        self._pipe = pipe
        self.output = b""

    def wait_for(self, text: str) -> None:
        """Read output until ``text`` has been printed."""
        deadline = time.monotonic() + PATIENCE_S
        while text.encode() not in self.output:
            assert self._read(deadline), f"the output ended without {text!r}: {self.output!r}"

    def result(self) -> Result:
        """Wait for the result frame, and read the output to its end."""
        header, blobs = self._worker.receive(meanwhile=self._pipe, into=self._take)
        deadline = time.monotonic() + PATIENCE_S
        while self._read(deadline):
            pass
        os.close(self._pipe)
        assert header["type"] == "result"
        assert header["execution_id"] == self._execution_id
        return Result(
            outcome=header["outcome"],
            value=Decoder(blobs).decode(header["value"]),
            display=header["display"],
            error=header["error"],
            output=self.output.decode("utf-8"),
        )

    def _read(self, deadline: float) -> bool:
        ready = self._worker.select([self._pipe], deadline)
        assert ready, f"neither output nor its end within {PATIENCE_S} s; so far {self.output[-500:]!r}"
        return self._take()

    def _take(self) -> bool:
        data = os.read(self._pipe, 1 << 16)
        self.output += data
        return bool(data)


class WorkerProcess:
    """Starts ``broker.worker.main.run`` in a process and speaks the broker's side of the channel."""

    def __init__(self, guest_socket: str = "/nonexistent/guest.sock", **environment: str) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(PATIENCE_S)
        self._files: list[int] = []
        self._buffer = b""
        self._count = 0
        self._interrupting = False
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(theirs.fileno()), guest_socket],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        theirs.close()
        self.ready = self.receive()[0]

    def begin(self, code: str, variables: dict[str, Any] | None = None, **fields: Any) -> Running:
        """Send an execution. ``fields`` go into the header as they are."""
        self._count += 1
        self._interrupting = False
        encoder = Encoder()
        encoded = {name: encoder.encode(value, name) for name, value in (variables or {}).items()}
        header = {"type": "execute", "execution_id": f"x{self._count}", "code": code, "variables": encoded, "drop": []}
        return self.begin_raw({**header, **fields}, encoder.blobs)

    def begin_raw(self, header: dict[str, Any], blobs: list[frames.Blob]) -> Running:
        """Send a header and blobs with a new pipe."""
        readable, writable = os.pipe()
        first, *rest = frames.dump_frame(header, blobs)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writable]))]
        sent = self.sock.sendmsg([first], rights)
        os.close(writable)
        for piece in (bytes(first)[sent:], *rest):
            if piece:  # else the worker may be gone already, and need not read any more
                self.sock.sendall(piece)
        return Running(self, header["execution_id"], readable)

    def execute(self, code: str, variables: dict[str, Any] | None = None, **fields: Any) -> Result:
        """Send an execution and wait for its result."""
        return self.begin(code, variables, **fields).result()

    def interrupt(self) -> None:
        """Send SIGINT, and again while the worker neither prints nor ends."""
        self._interrupting = True
        os.kill(self.process.pid, signal.SIGINT)

    def select(self, watched: list[Any], deadline: float) -> list[Any]:
        """Return which of these can be read, or nothing after the deadline (of the monotonic clock)."""
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select(watched, [], [], min(left, REMINDER_S) if self._interrupting else left)
            if ready:
                return ready
            if self._interrupting and left > REMINDER_S:
                os.kill(self.process.pid, signal.SIGINT)
        return []

    def receive(
        self, meanwhile: int | None = None, into: Callable[[], bool] | None = None
    ) -> tuple[dict[str, Any], list[Any]]:
        """Read one frame; drain the descriptor ``meanwhile`` so that a full pipe blocks nobody."""

        def exactly(size: int) -> bytes:
            while len(self._buffer) < size:
                self._await_channel(meanwhile, into)
                data, fds, _, _ = socket.recv_fds(self.sock, 1 << 20, 1)
                if not data:
                    raise EOFError
                self._buffer += data
                self._files += fds
            piece, self._buffer = self._buffer[:size], self._buffer[size:]
            return piece

        header, blobs = frames.read_frame(exactly)
        if header.get("file") is not True:
            return header, blobs
        file = BlobFile.received([self._files.pop()], header["blobs"])
        blobs = list(file.views())
        file.close()
        return header, blobs

    def _await_channel(self, meanwhile: int | None, into: Callable[[], bool] | None) -> None:
        watched: list[Any] = [self.sock] if meanwhile is None else [self.sock, meanwhile]
        deadline = time.monotonic() + PATIENCE_S
        while True:
            ready = self.select(watched, deadline)
            assert ready, f"no frame from the worker within {PATIENCE_S} s"
            if self.sock in ready:
                return
            assert into is not None
            if not into():
                watched.remove(meanwhile)

    def close(self) -> int:
        """Close the channel and return the process's exit status."""
        self.sock.close()
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()


Answer = Callable[[dict[str, Any]], dict[str, Any]]


class GuestPlane:
    """A guest plane on a Unix socket.

    Attributes:
        tools: By tool name, a function of decoded ``args`` and ``kwargs``; what it returns is the tool's result.
        answers: By tool name, a function of the request that returns the ToolCallStatus itself.
        later: By call id, the status that a GET returns.
        requests: Every POST body, in the order of arrival.
        lines: Every request line with the number of its connection.
        speaks_frames: Whether an Upgrade is granted; without, the worker speaks HTTP.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.speaks_frames = False
        self.tools: dict[str, Callable[..., Any]] = {}
        self.answers: dict[str, Answer] = {}
        self.later: dict[str, Answer] = {}
        self.requests: list[dict[str, Any]] = []
        self.lines: list[tuple[int, str]] = []
        self.connections = 0
        self.open_connections: set[socket.socket] = set()
        #: Set to a number of POSTs whose connection breaks after they were read.
        self.break_after_reading = 0
        self.lock = threading.Lock()
        self.arrived = threading.Semaphore(0)
        plane = self

        class Handler(_Handler):
            guest = plane

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 4096

        self._server = Server(path, Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and break every connection."""
        self._server.shutdown()
        self._server.server_close()
        Path(self.path).unlink(missing_ok=True)
        for connection in list(self.open_connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def status(self, request: dict[str, Any], blobs: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        """Answer a POST."""
        tool = request["tool"]
        if tool in self.answers:
            return self.answers[tool](request), []
        decoder = Decoder(blobs)
        args = [decoder.decode(value) for value in request["args"]]
        kwargs = {name: decoder.decode(value) for name, value in request["kwargs"].items()}
        encoder = Encoder()
        value = encoder.encode(self.tools[tool](*args, **kwargs), "result")
        return {"call_id": request["key"], "state": "done", "value": value, "error": None}, encoder.blobs


class _Handler(BaseHTTPRequestHandler):
    guest: GuestPlane
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = False

    def setup(self) -> None:
        super().setup()
        with self.guest.lock:
            self.guest.connections += 1
            self.number = self.guest.connections
            self.guest.open_connections.add(self.connection)

    def finish(self) -> None:
        with self.guest.lock:
            self.guest.open_connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        is_frame = self.headers["Content-Type"] == frames.FRAME_CONTENT_TYPE
        request, blobs = frames.load_frame(body) if is_frame else (json.loads(body), [])
        with self.guest.lock:
            self.guest.lines.append((self.number, self.requestline))
            self.guest.requests.append(request)
            breaks = self.guest.break_after_reading > 0
            self.guest.break_after_reading -= breaks
        self.guest.arrived.release()
        if breaks:
            self.close_connection = True
            return
        status, out = self.guest.status(request, blobs)
        self._reply(status.pop("http_status", 200), status, out)

    def do_GET(self) -> None:
        if self.path == "/v1/frames":
            agreed = self.guest.speaks_frames and self.headers["Upgrade"] == frames.FRAMED_UPGRADE
            self._frames() if agreed else self._reply(404, {"error": {"message": "not that"}}, [])
            return
        with self.guest.lock:
            self.guest.lines.append((self.number, self.requestline))
        call_id = self.path.split("?")[0].rsplit("/", 1)[1]
        self._reply(200, self.guest.later[call_id]({"path": self.path}), [])

    def _frames(self) -> None:
        """Serve framed requests until the other side closes."""
        self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: rlm-sandbox.frames\r\n\r\n")
        self.close_connection = True
        while True:
            header, blobs = frames.read_frame(self._exactly)
            with self.guest.lock:
                self.guest.lines.append((self.number, header["request"]))
                self.guest.requests.append(header["body"])
                breaks = self.guest.break_after_reading > 0
                self.guest.break_after_reading -= breaks
            if breaks:
                return
            if header["request"].startswith("GET"):
                call_id = header["request"].split("?")[0].rsplit("/", 1)[1]
                status, out = self.guest.later[call_id]({"path": header["request"]}), []
            else:
                status, out = self.guest.status(header["body"], blobs)
            reply = frames.dump_frame({"status": status.pop("http_status", 200), "body": status}, out)
            self.wfile.write(b"".join(bytes(piece) for piece in reply))

    def _exactly(self, count: int) -> bytes:
        data = self.rfile.read(count)
        if len(data) < count:
            raise ConnectionResetError
        return data

    def _reply(self, code: int, header: dict[str, Any], blobs: list[Any]) -> None:
        if blobs:
            body, kind = b"".join(bytes(p) for p in frames.dump_frame(header, blobs)), frames.FRAME_CONTENT_TYPE
        else:
            body, kind = json.dumps(header).encode(), frames.JSON_CONTENT_TYPE
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def tool(name: str, *parameters: str | ToolParameter, doc: str = "", returns: str | None = None) -> dict[str, Any]:
    """Return a tool's definition as JSON; parameters given as text are positional or keyword, without default."""
    full = tuple(ToolParameter(name=p, kind="positional_or_keyword") if isinstance(p, str) else p for p in parameters)
    return ToolDefinition(name=name, parameters=full, doc=doc, returns=returns).to_json()
