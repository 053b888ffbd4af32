"""The framed form of a plane: after an HTTP Upgrade, requests and replies are frames on the same connection.

The same requests, bodies and errors as over HTTP, without HTTP's parsing and without a greenlet for each (what that
saves: decisions 009 and 012). A request's frame has the header ``{"request": "POST /v1/...", "body": {...}}``, its
reply's ``{"status": 200, "body": {...}}``, both with the blobs that the body refers to. One request at a time; to one
with ``stream=1`` there may be several replies, all but the last with ``"more": true``. A request that this form does
not serve is answered with 404, and HTTP serves it.

Everything here runs in callbacks of the event loop: nothing may wait.
"""

from __future__ import annotations

import functools
import select
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl

import gevent
from gevent.event import Event

from broker import host_requests
from broker.errors import BadRequest, BrokerError, FileMissing, InternalError, UnknownCall, UnknownRoute
from broker.family import Family
from broker.logs import Log
from broker.lull import manners
from broker.outbox import Outbox
from broker.protocol import limits, raw_output, reading
from broker.protocol.blob_file import ANCILLARY_BYTES, MOST_FDS, BlobFile, Blobs, close_all, descriptors, rights
from broker.protocol.frames import Blob, FrameAssembler, FrameError, blob_lengths, dump_frame
from broker.protocol.messages import Progress, ToolCallRequest, ToolCallStatus
from broker.query import TargetQuery, query_number
from broker.sessions import Sessions
from broker.waiting import Deliver

JsonObject = dict[str, Any]

_READ_BYTES = 64 << 10
_MOST_READ_BYTES = 4 << 20
_READABLE = 1
#: Served in one turn of the event loop; whoever sends more in a row is not the only one served.
_MOST_FRAMES = 32
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
#: Answers to calls that the broker has not heard of; a worker that told the host alone is never going to tell.
_MOST_EARLY = 1_000


class Connected(Protocol):
    """What a handler asks of the connection that a request came on."""

    def still_there(self) -> bool:
        """Tell whether the other side still holds it open."""


#: What is answered: a message, or a body, and the blobs that it refers to.
Answer = tuple[Progress | ToolCallStatus | JsonObject, Blobs]


class Request(NamedTuple):
    """One framed request.

    Attributes:
        argument: The third part of the path, such as the session's id.
        query: What stood behind the path.
        body: The body.
        blobs: What it refers to. A file that is not taken over (``BlobFile.moved``) is closed after the handler.
        size: Bytes of the whole frame, its file included.
        connection: What it came on.
        answer: Takes the answer, or several where all but the last are ``Progress`` with ``more``; None where it was
            given on another way.
        framed: The connection, framed.
        aside: Whether nobody waits for the answer; see ``FramedConnection.hear_asides``.
    """

    argument: str
    query: Mapping[str, str]
    body: JsonObject
    blobs: Blobs
    size: int
    connection: Connected
    answer: Deliver[Answer | None]
    framed: FramedConnection
    aside: bool = False


#: Ends a wait whose answer nobody takes any more.
Cancel = Callable[[], None]
#: What may be said aside; see ``FramedConnection.hear_asides``.
_ASIDE = ("POST", "tool-calls", "result")
#: By method, and the second and fourth part of the path.
Routes = Mapping[tuple[str, str, str], Callable[[Request], Cancel | None]]


def host_routes(sessions: Sessions) -> Routes:
    """Return what the host may ask in frames."""

    def execute(request: Request) -> Cancel | None:
        session, there = sessions[request.argument], request.connection.still_there
        return host_requests.execute_later(session, request.query, request.body, request.blobs, there, request.answer)

    def claim(request: Request) -> Cancel | None:
        session, there = sessions[request.argument], request.connection.still_there
        return host_requests.claim_later(session, request.query, request.body, there, request.answer)

    def answer(request: Request) -> Cancel | None:
        session, call = host_requests.answer(
            sessions,
            request.argument,
            request.query,
            request.body,
            request.blobs,
            request.size,
            reads=not request.aside,  # this may be within the reading of what it would read
        )
        if request.aside:
            session.core.tool_calls.note_read(call)  # the host has told its caller too
        reply: JsonObject = {"call_id": call.call_id, "state": call.state.value}
        claimed = session.claim_one(request.connection.still_there) if "claim" in request.query else None
        if claimed is not None:
            reply["claims"] = claimed[0].to_json()["claims"]
        request.answer((reply, () if claimed is None else claimed[1]))
        return None

    def lane(request: Request) -> Cancel | None:
        session = sessions[request.argument]
        host_requests.check_epoch(session, request.query)
        request.framed.hear_asides()
        request.framed.hand_over(session.open_lane(request.framed))
        request.answer(({}, ()))
        return None

    return {
        ("POST", "sessions", "lane"): lane,
        ("POST", "sessions", "executions"): execute,
        ("POST", "sessions", "claims"): claim,
        ("POST", "tool-calls", "result"): answer,
    }


def guest_routes(family: Family) -> Routes:
    """Return what generated code of one slot may ask in frames."""

    def submit(request: Request) -> Cancel | None:
        call = ToolCallRequest.from_json(request.body)
        session = family.running(call.execution_id)
        waiter = session.call_tool_later(call, request.blobs, request.size, request.answer)
        return host_requests.ending(session, waiter)

    def read(request: Request) -> Cancel | None:
        session = family.of_call(request.argument)
        call = session.core.tool_calls.get(request.argument)
        if "again" in request.query:
            session.offer_again(call)
        wait_s = query_number(request.query, "wait_s", 0.0)
        return host_requests.ending(session, session.wait_for_call_later(call, wait_s, request.answer))

    return {("POST", "tool-calls", ""): submit, ("GET", "tool-calls", ""): read}


class FramedConnection:
    """Serves framed requests on one connection.

    Args:
        sock: A gevent socket, just upgraded.
        connection: For the handlers.
        routes: What is served.
        log: For defects.
        max_bytes: Largest request taken, without its file.
        max_file_bytes: Largest file taken with a request, or 0 where blobs do not travel in files.
        whole: Whether a descriptor must come in one read with its whole frame. As many connections as generated code
            may open could else hold a descriptor each.
    """

    def __init__(
        self,
        sock: Any,
        connection: Connected,
        routes: Routes,
        log: Log,
        *,
        max_bytes: int = limits.MAX_FRAME_BYTES,
        max_file_bytes: int = 0,
        whole: bool = False,
    ) -> None:
        # A plain socket on the same connection: gevent's own would let whoever reads wait in a greenlet.
        self._sock = socket.socket(fileno=socket.dup(sock.fileno()))
        self._sock.setblocking(False)
        self._connection, self._routes, self._log = connection, routes, log
        self._files = max_file_bytes > 0
        self._max_file_bytes, self._whole = max_file_bytes, whole
        self._frames = FrameAssembler(max_bytes, files=self._files)
        self._fds: list[int] = []
        self._outbox = Outbox(self._sock, on_empty=self._go_on, on_broken=self._end)
        self._watcher = gevent.get_hub().loop.io(self._sock.fileno(), _READABLE)
        # A request is being answered from its frame's arrival until its last reply; no other is looked at meanwhile.
        self._answering = False
        self._cancel: Cancel | None = None
        self._hears_asides = self._raw_output = False
        self._attends = True
        # A request that came while another one was being answered; behind it nothing is read.
        self._next: tuple[JsonObject, Sequence[Blob]] | None = None
        # Asides whose call was not known when they came.
        self._early: list[tuple[JsonObject, Sequence[Blob], int]] = []
        self._last = False
        self._held_back: list[Blob] | None = None
        self._handed: socket.socket | None = None
        self._ended = Event()

    def serve(self) -> None:
        """Answer requests until the other side closes, or sends what is no frame."""
        self._watcher.start(self._readable)
        try:
            self._ended.wait()
        finally:
            self._close()

    def read_now(self) -> bool:
        """Serve what has arrived, as far as its turn has come; tell whether anything new had."""
        arrived = False
        self._say_early()
        self._take_all()
        while not (self._is_deaf() or self._ended.is_set()) and self._readable():
            arrived = True
            self._take_all()
        return arrived

    def attend(self, wanted: bool) -> None:
        """See ``lull.Line.attend``."""
        self._attends = wanted
        if self._ended.is_set():
            return
        if not wanted:
            self._watcher.stop()
        elif not self._watcher.active:
            self._watcher.start(self._readable)

    def hear_asides(self) -> None:
        """From now on take answers to tool calls also while a request is being answered.

        They have ``"aside": true`` and get no reply: who sends one has told the worker too, and goes on.
        """
        self._hears_asides = True

    def hand_over(self, sock: socket.socket) -> None:
        """Attach a descriptor to the next answer; it is lost where that cannot leave at once, or does not take any.

        Args:
            sock: Closed when it was sent.
        """
        self._handed = sock

    def _readable(self) -> bool:
        """Read once and serve what there is; tell whether anything came."""
        if self._is_deaf():
            self._look_for_end()
            return False
        try:
            data = self._receive(max(_READ_BYTES, min(self._frames.missing, _MOST_READ_BYTES)))
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._end()
            return False
        self._frames.add(data)
        self._take_frames()
        if self._fds and self._whole:
            self._end()  # they came without the end of their frame
        return True

    def _is_deaf(self) -> bool:
        """Tell whether nothing is to be read now."""
        return self._outbox.full or self._next is not None or (self._answering and not self._hears_asides)

    def _receive(self, size: int) -> bytes:
        if not self._files:
            return self._sock.recv(size)
        data, ancillary, _, _ = self._sock.recvmsg(size, ANCILLARY_BYTES, _CLOEXEC)
        if ancillary:
            self._fds += descriptors(ancillary)
            if len(self._fds) > MOST_FDS:
                raise OSError("descriptors without frames")
        return data

    def _look_for_end(self) -> None:
        """While a request is answered nothing is read, but a client that goes away is noticed."""
        try:
            gone = not self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone and self._next is None:
            self._end()
        else:
            self._watcher.stop()  # it sends ahead; that can wait, also where it is gone since: it was said

    def _take_frames(self) -> bool:
        """Serve requests that came together, and send those answers together that are there at once.

        Returns:
            Whether there may be more of them: whoever sends many in a row is not the only one served.
        """
        held: list[Blob] = []
        outer = self._held_back
        self._held_back = held if outer is None else outer
        for _ in range(_MOST_FRAMES):
            if not self._take_frame() or self._last or self._is_deaf() or not self._frames.started:
                more = False
                break
            manners.give_way()
        else:
            more = not self._ended.is_set()
        self._held_back = outer
        if held and not self._ended.is_set():
            self._post(held)
        if more and self._hears_asides:  # after which no reply is sent, and so nobody goes on
            gevent.get_hub().loop.run_callback(self._take_next)
        return more

    def _take_frame(self) -> bool:
        """Serve the next request; tell whether there was one."""
        try:
            frame = self._next_frame()
        except FrameError as error:
            self._last = True
            self._send(*_failed(BadRequest(f"malformed frame: {error}")))
            return True
        if frame is None:
            return False
        if self._answering:
            self._next = frame
        else:
            self._answering = True
            self._handle_frame(*frame)
        return True

    def _next_frame(self) -> tuple[JsonObject, Sequence[Blob]] | None:
        """Return the next request, after taking the asides before it."""
        if self._next is not None:
            frame, self._next = self._next, None
            return frame
        while (read := self._frames.next()) is not None and self._hears_asides and read[0].get("aside") is True:
            self._handle_aside(*read)
        return read

    def _handle_frame(self, header: JsonObject, blobs: Sequence[Blob]) -> None:
        """Serve a request; it is the frame that was read last."""
        if self._frames.in_file:
            self._handle_file(header)
            return
        if self._fds and (self._whole or not self._frames.started):
            self._drop_descriptors()
        self._handle(header, blobs, self._frames.size)

    def _handle_aside(self, header: JsonObject, blobs: Sequence[Blob]) -> None:
        """Take an answer that nobody waits to be told about: what is refused counts as never said.

        Where its call is not known, the worker's word of that is read in a moment: it is kept until then.
        """
        aside = header, blobs, self._frames.size
        if not self._say_aside(*aside):
            self._early = [*self._early[-_MOST_EARLY:], aside]
            gevent.get_hub().loop.run_callback(self._say_early)

    def _say_early(self) -> None:
        """Say once more what came before its call."""
        early, self._early = self._early, []
        self._early = [each for each in early if not self._say_aside(*each)]

    def _say_aside(self, header: JsonObject, blobs: Sequence[Blob], size: int) -> bool:
        """Pass an answer on; tell whether its call was known."""
        try:
            read = reading.Reader(header, "framed request")
            route, argument, query = _target(read.text("request", max_chars=2000))
            if route == _ASIDE:
                body = read.mapping("body", {})
                self._routes[route](
                    Request(argument, query, body, blobs, size, self._connection, lambda answer: None, self, aside=True)
                )
        except UnknownCall:
            return False
        except (BrokerError, reading.BadRequest):
            pass
        except Exception as error:
            self._log.defect("framed", error)
        return True

    def _drop_descriptors(self) -> None:
        """Close what no frame has announced."""
        close_all(self._fds)
        self._fds = []

    def _handle_file(self, header: JsonObject) -> None:
        fds, self._fds = self._fds, []
        if not fds:
            self._answered(FileMissing("no descriptor came with a frame that announced a file"))
            return
        try:
            lengths = list(blob_lengths(header, max_bytes=self._max_file_bytes))
        except FrameError as error:
            close_all(fds)
            self._answered(BadRequest(f"malformed frame: {error}"))
            return
        try:
            file = BlobFile.received(fds, lengths)
        except FrameError as error:
            self._answered(BadRequest(f"malformed frame: {error}"))
            return
        try:
            self._handle(header, file, self._frames.size + file.size)
        finally:
            file.close()  # by now it was handed on or taken over, or nobody wants it

    def _handle(self, header: JsonObject, blobs: Blobs, size: int) -> None:
        try:
            read = reading.Reader(header, "framed request")
            route, argument, query = _target(read.text("request", max_chars=2000))
            handler = self._routes.get(route)
            if handler is None:
                raise UnknownRoute("nothing is served in frames under this path")
            body = read.mapping("body", {})
            self._raw_output = header.get(raw_output.ASKED) is True
            cancel = handler(Request(argument, query, body, blobs, size, self._connection, self._answered, self))
            if self._answering:
                self._cancel = cancel
        except BrokerError as error:
            self._answered(error)
        except reading.BadRequest as error:
            self._answered(BadRequest(str(error)))
        except Exception as error:
            self._log.defect("framed", error)
            self._answered(InternalError("a defect of the broker; the sandbox's log says more"))

    def _answered(self, answer: Answer | BrokerError | None) -> None:
        if self._ended.is_set():
            return
        if answer is None:
            self._answering, self._cancel = False, None
            self._go_on()
            return
        file = None
        if isinstance(answer, BrokerError):
            more, reply = False, _failed(answer)
        else:
            message, blobs = answer
            more = isinstance(message, Progress) and message.more
            body = message if isinstance(message, dict) else message.to_json()
            raw = raw_output.lifted(body, blobs) if self._raw_output and isinstance(message, Progress) else None
            file = BlobFile.worth(raw) if raw is not None and self._files else None
            reply = (200, body, file or raw or blobs)
        if not more:
            self._answering, self._cancel = False, None
        self._send(*reply)
        if file is not None:
            file.close()

    def _send(self, status: int, body: JsonObject, blobs: Blobs) -> None:
        header: JsonObject = {"status": status, "body": body}
        if type(blobs) is not BlobFile:
            pieces = dump_frame(header, blobs)
        elif self._can_send_file(blobs):
            self._post(dump_frame({**header, "file": True, "blobs": blobs.lengths}), rights([blobs.fd]))
            return
        else:
            pieces = dump_frame(header, blobs.views())
        if self._held_back is None:
            self._post(pieces)
        else:
            self._held_back += pieces

    def _can_send_file(self, file: BlobFile) -> bool:
        """Tell whether a descriptor would surely leave now: it goes with the first byte, or is lost."""
        return self._files and file.fd >= 0 and not (self._held_back or self._outbox.full) and _takes_bytes(self._sock)

    def _post(self, pieces: Sequence[Blob], ancillary: Sequence[tuple[int, int, bytes]] = ()) -> None:
        try:
            self._outbox.send(pieces, ancillary or self._rights())
        except OSError:
            self._end()
            return
        finally:
            if self._handed is not None:
                self._handed.close()
                self._handed = None
        if not self._outbox.full:
            self._go_on()

    def _rights(self) -> Sequence[tuple[int, int, bytes]]:
        """Return the ancillary data for a descriptor that is to be handed over."""
        if self._handed is None:
            return ()
        return rights([self._handed.fileno()])

    def _go_on(self) -> None:
        """Everything has been sent: look at the next request."""
        if self._last:
            self._end()
        elif self._hears_asides or not self._answering:
            if self._attends and not self._watcher.active:
                self._watcher.start(self._readable)
            if self._frames.started or self._next is not None:
                # In a later turn: whoever sends many in a row is not the only one served.
                gevent.get_hub().loop.run_callback(self._take_next)

    def _take_next(self) -> bool:
        waits = self._answering and (self._next is not None or not self._hears_asides)
        return not (waits or self._outbox.full or self._ended.is_set()) and self._take_frames()

    def _take_all(self) -> None:
        while (self._frames.started or self._next is not None) and self._take_next():
            pass

    def _end(self) -> None:
        self._watcher.stop()
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()
        self._ended.set()

    def _close(self) -> None:
        self._end()
        self._drop_descriptors()
        self._watcher.close()
        self._outbox.close()
        self._sock.close()


@functools.lru_cache(maxsize=256)
def _target(text: str) -> tuple[tuple[str, str, str], str, Mapping[str, str]]:
    """Split ``POST /v1/sessions/x/claims?epoch=1`` into the route, its argument, and the query."""
    method, _, rest = text.partition(" ")
    path, _, query = rest.partition("?")
    parts = path.split("/")
    if len(parts) > 5 or parts[1:2] != ["v1"]:
        raise UnknownRoute("nothing is served in frames under this path")
    parts += [""] * (5 - len(parts))
    return (method, parts[2], parts[4]), parts[3], TargetQuery(parse_qsl(query) if query else ())


def _takes_bytes(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLOUT)
    return any(events == select.POLLOUT for _, events in poll.poll(0))


def _failed(error: BrokerError) -> tuple[int, JsonObject, Blobs]:
    return error.status, error.to_json(), ()
