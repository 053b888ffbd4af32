"""The framed form of a plane: after an HTTP Upgrade, requests and replies are frames on the same connection.

The same requests, bodies and errors as over HTTP, without HTTP's parsing (what that saves: decision 009). A
request's frame has the header ``{"request": "POST /v1/...", "body": {...}}``, its reply's
``{"status": 200, "body": {...}}``, both with the blobs that the body refers to. One request at a time; a
request that this form does not serve is answered with 404, and HTTP serves it.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl

import gevent
import gevent.socket

from broker import host_requests
from broker.errors import BadRequest, BrokerError, InternalError, UnknownRoute
from broker.live_session import LiveSession
from broker.logs import Log
from broker.protocol import limits, reading
from broker.protocol.frames import Blob, FrameAssembler, FrameError, dump_frame
from broker.protocol.messages import ToolCallRequest
from broker.query import query_number
from broker.sessions import Sessions

JsonObject = dict[str, Any]

_READ_BYTES = 64 << 10


class Connected(Protocol):
    """What a handler asks of the connection that a request came on."""

    def still_there(self) -> bool:
        """Tell whether the other side still holds it open."""


class Request(NamedTuple):
    """One framed request; ``argument`` is the third part of the path, such as the session's id."""

    argument: str
    query: Mapping[str, str]
    body: JsonObject
    blobs: Sequence[Blob]
    size: int
    connection: Connected


Answer = tuple[JsonObject, Sequence[Blob]]
#: By method, and the second and fourth part of the path.
Routes = Mapping[tuple[str, str, str], Callable[[Request], Answer]]


def host_routes(sessions: Sessions) -> Routes:
    """Return what the host may ask in frames."""

    def execute(request: Request) -> Answer:
        session = sessions[request.argument]
        still_there = request.connection.still_there
        progress, blobs = host_requests.execute(session, request.query, request.body, request.blobs, still_there)
        return progress.to_json(), blobs

    def claim(request: Request) -> Answer:
        session = sessions[request.argument]
        progress, blobs = host_requests.claim(session, request.query, request.body, request.connection.still_there)
        return progress.to_json(), blobs

    def answer(request: Request) -> Answer:
        _, call = host_requests.answer(
            sessions, request.argument, request.query, request.body, request.blobs, request.size
        )
        return {"call_id": call.call_id, "state": call.state.value}, ()

    return {
        ("POST", "sessions", "executions"): execute,
        ("POST", "sessions", "claims"): claim,
        ("POST", "tool-calls", "result"): answer,
    }


def guest_routes(session: LiveSession) -> Routes:
    """Return what one session's generated code may ask in frames."""

    def submit(request: Request) -> Answer:
        status, blobs = session.call_tool(ToolCallRequest.from_json(request.body), request.blobs, request.size)
        return status.to_json(), blobs

    def read(request: Request) -> Answer:
        call = session.core.tool_calls.get(request.argument)
        status, blobs = session.wait_for_call(call, query_number(request.query, "wait_s", 0.0))
        return status.to_json(), blobs

    return {("POST", "tool-calls", ""): submit, ("GET", "tool-calls", ""): read}


class FramedConnection:
    """Serves framed requests on one connection.

    Args:
        sock: A gevent socket, just upgraded.
        connection: For the handlers.
        routes: What is served.
        log: For defects.
        max_bytes: Largest request taken.
    """

    def __init__(
        self, sock: Any, connection: Connected, routes: Routes, log: Log, *, max_bytes: int = limits.MAX_FRAME_BYTES
    ) -> None:
        self._sock, self._connection, self._routes, self._log = sock, connection, routes, log
        self._frames = FrameAssembler(max_bytes)

    def serve(self) -> None:
        """Answer requests until the other side closes, or sends what is no frame."""
        try:
            while True:
                try:
                    frame = self._receive()
                except FrameError as error:
                    self._send(*_failed(BadRequest(f"malformed frame: {error}")))
                    return
                if frame is None:
                    return
                self._send(*self._answer(*frame))
        except OSError:
            return  # the other side went away

    def _answer(self, header: JsonObject, blobs: Sequence[Blob]) -> tuple[int, JsonObject, Sequence[Blob]]:
        try:
            read = reading.Reader(header, "framed request")
            method, path, query = _target(read.text("request", max_chars=2000))
            handler = self._routes.get((method, path[2], path[4]))
            if handler is None or path[1] != "v1":
                raise UnknownRoute("nothing is served in frames under this path")
            body = read.mapping("body", {})
            return (200, *handler(Request(path[3], query, body, blobs, self._frames.size, self._connection)))
        except BrokerError as error:
            return _failed(error)
        except reading.BadRequest as error:
            return _failed(BadRequest(str(error)))
        except Exception as error:
            self._log.defect("framed", error)
            return _failed(InternalError("a defect of the broker; the sandbox's log says more"))

    def _receive(self) -> tuple[JsonObject, Sequence[Blob]] | None:
        while True:
            frame = self._frames.next()
            if frame is not None:
                return frame
            if _readable(self._sock):
                gevent.sleep(0)  # reading would not wait: without this, one busy client would be the only one served
            data = self._sock.recv(max(_READ_BYTES, min(self._frames.missing, 4 << 20)))
            if not data:
                return None
            self._frames.add(data)

    def _send(self, status: int, body: JsonObject, blobs: Sequence[Blob]) -> None:
        pieces = dump_frame({"status": status, "body": body}, blobs)
        if sum(map(len, pieces)) <= _READ_BYTES:
            self._sock.sendall(b"".join(pieces))
            return
        for piece in pieces:
            self._sock.sendall(piece)


def _target(text: str) -> tuple[str, list[str], Mapping[str, str]]:
    """Split ``POST /v1/sessions/x/claims?epoch=1`` into method, five parts of the path, and the query."""
    method, _, rest = text.partition(" ")
    path, _, query = rest.partition("?")
    parts = path.split("/")
    if len(parts) > 5:
        raise UnknownRoute("nothing is served in frames under this path")
    return method, parts + [""] * (5 - len(parts)), dict(parse_qsl(query)) if query else {}


def _readable(sock: Any) -> bool:
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _failed(error: BrokerError) -> tuple[int, JsonObject, Sequence[Blob]]:
    return error.status, error.to_json(), ()
