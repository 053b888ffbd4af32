"""What the interpreter asks of a broker, and the client that asks it over HTTP. The routes: ``docs/protocol.md``."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote

from broker.protocol import PROTOCOL_VERSION, limits, raw_output
from broker.protocol.blob_file import WORTH_BYTES
from broker.protocol.frames import Blob
from broker.protocol.messages import (
    Attached,
    Claim,
    ClaimRequest,
    ExecuteRequest,
    HeldBy,
    OpenRequest,
    Progress,
    ToolDefinition,
    ToolParameter,
    ToolResult,
    Verdict,
)
from broker.protocol.reading import BadRequest, Reader
from host_client.errors import (
    BrokerError,
    CallGone,
    Fenced,
    ForkFailed,
    LeaseExpired,
    MalformedReply,
    ProtocolMismatch,
    SessionBusy,
    SessionLost,
    SessionNameTaken,
    TooManyForks,
    TooManySnapshots,
    UnknownSnapshot,
)
from host_client.lane_user import LaneUser
from host_client.program import this_program
from host_client.transport import BrokerTimeout, Reply, Transport

#: Requests that nothing waits for in the broker.
_PROMPT_S = 10.0
#: A fork takes milliseconds; the broker gives up waiting for one sooner than this.
_FORK_S = 30.0
#: How much later than asked a long poll may be answered by a broker that is merely busy.
LATE_S = 5.0
#: 20 MB/s: a busy machine copies large values slowly.
_SEND_S_PER_BYTE = 1 / 20e6
_NOT_FOUND = 404
_MAX_ERROR_CHARS = 10_000
#: What most sessions have is made once with: a tool. It is taken away again.
_REHEARSED = (
    ToolDefinition(
        name="rehearsed",
        parameters=(ToolParameter(name="text", kind="positional_or_keyword", default="''", annotation="str"),),
        returns="str",
    ),
)

Answer = TypeVar("Answer")


class News(NamedTuple):
    """The answer to posting an execution and to asking for claims.

    Attributes:
        progress: The message.
        blobs: Raw parts of the result's value, or of the claims' arguments (``Claim.blob_range``).
    """

    progress: Progress
    blobs: Sequence[Blob]


class SessionInfo(NamedTuple):
    """A session as its broker describes it.

    Attributes:
        session_id: The broker's id.
        name: The host's name for it, or None.
        epoch: Counts the clients that have held it.
        lost: Why it is gone, or None while it lives.
        secrets: Names of the secrets that its code may read.
        running: The execution that runs, or None.
        keep: Whether clients leave it as it is when they go.
        ttl_s: Idle time in seconds after which it ends, or None.
        held_by: Who holds it, as far as that was told.
        executions: How many it has begun.
        age_s: Seconds since it was opened.
        idle_s: Seconds since something was last done with it.
        memory_bytes: What its worker takes, where that was asked for and can be told.
    """

    session_id: str
    name: str | None
    epoch: int
    lost: str | None
    secrets: tuple[str, ...] = ()
    running: str | None = None
    keep: bool = False
    ttl_s: float | None = None
    held_by: HeldBy | None = None
    executions: int = 0
    age_s: float = 0.0
    idle_s: float = 0.0
    memory_bytes: int | None = None


class SnapshotInfo(NamedTuple):
    """A snapshot as its broker describes it.

    Attributes:
        snapshot_id: The broker's id.
        name: The host's name for it, or one that was made up.
        taken_at: Seconds since 1970.
        not_kept: What it lacks, in the words of generated code.
    """

    snapshot_id: str
    name: str
    taken_at: float
    not_kept: tuple[str, ...] = ()


class BrokerClient(Protocol):
    """Speaks to one broker, for the holder of one session. Implementations are safe to share between threads.

    Every method raises ``BrokerUnreachable``, ``MalformedReply``, ``SessionLost`` or another ``BrokerError``.
    """

    def check(self) -> None:
        """Check once that the broker is there and speaks our version of the protocol.

        Raises:
            ProtocolMismatch: It speaks another one.
        """

    def open_session(
        self,
        name: str | None = None,
        secrets: Mapping[str, str] | None = None,
        *,
        keep: bool = False,
        ttl_s: float | None = None,
    ) -> str:
        """Open a session and return its id.

        Args:
            name: To find it by, from another process too.
            secrets: Environment variables of its code.
            keep: Whether its clients are to leave it as it is when they go.
            ttl_s: Idle time in seconds after which it ends, or None.

        Raises:
            SessionNameTaken: There is one of that name.
        """

    def rehearse(self, session_id: str, timeout_s: float) -> None:
        """Do now what would else be done at a fresh session's first executions; no code runs, and no tool is left.

        Args:
            session_id: The session.
            timeout_s: How long each of them may take, in seconds.
        """

    def sessions(self, *, timeout_s: float = _PROMPT_S, memory: bool = False) -> list[SessionInfo]:
        """Return every session of the sandbox.

        Args:
            timeout_s: How long the broker may take.
            memory: Whether to read what each takes.
        """

    def attach(self, session_id: str, epoch: int) -> Attached:
        """Take a session over; from now on this client speaks in its new epoch.

        Args:
            session_id: The session.
            epoch: The epoch that was seen last.

        Raises:
            Fenced: Somebody else attached since.
        """

    def fork(self, session_id: str, count: int) -> list[str]:
        """Fork a session, and return the ids of sessions that begin with its namespace.

        Raises:
            SessionBusy, TooManyForks, ForkFailed: There is none.
        """

    def snapshot(self, session_id: str, name: str | None) -> SnapshotInfo:
        """Remember a session's namespace as it is.

        Raises:
            SessionBusy, TooManySnapshots, TooManyForks, ForkFailed: It was not.
        """

    def snapshots(self, session_id: str) -> list[SnapshotInfo]:
        """Return the snapshots of a session, oldest first."""

    def drop_snapshot(self, session_id: str, snapshot_id: str) -> None:
        """Forget a snapshot. Idempotent."""

    def roll_back(self, session_id: str, snapshot_id: str) -> None:
        """Give a session the namespace of one of its snapshots.

        Raises:
            SessionBusy, UnknownSnapshot, ForkFailed: The namespace is as it was.
        """

    def resolve(self, call_id: str, attempt: int, verdict: Verdict) -> None:
        """Say what became of a started call that nobody answers.

        Raises:
            LeaseExpired, CallGone: There is nothing to say any more.
        """

    def execute(
        self,
        session_id: str,
        request: ExecuteRequest,
        blobs: Sequence[Blob | str],
        wanted: ClaimRequest,
        *,
        late_s: float = LATE_S,
        on_claims: Callable[[News], None] | None = None,
    ) -> News:
        """Post an execution and wait for its end, or for tool calls, as ``claim`` does.

        Args:
            session_id: The session.
            request: Posting the same id again runs nothing.
            blobs: Raw parts of the variables; ASCII texts may be left as they are.
            wanted: What to wait for.
            late_s: See ``claim``.
            on_claims: See ``claim``.
        """

    def claim(
        self,
        session_id: str,
        wanted: ClaimRequest,
        *,
        late_s: float = LATE_S,
        on_claims: Callable[[News], None] | None = None,
    ) -> News:
        """Claim tool calls, renew claims, and wait for a claim or the end of the execution.

        Args:
            session_id: The session.
            wanted: What to claim, and how long to wait.
            late_s: How many seconds later the answer may come before the broker counts as gone.
            on_claims: Takes claims as they come, so that one request can bring all calls of an execution; then
                ``wanted.limit`` is for those held at once. The answer itself may have claims all the same. With None
                there is one answer.
        """

    def answer(self, call_id: str, result: ToolResult, blobs: Sequence[Blob], *, claim: bool = False) -> News | None:
        """Post what a tool gave.

        Args:
            call_id: The call.
            result: The answer.
            blobs: Raw parts of its value.
            claim: Take the next call in the same breath, if there is one; it counts as started.

        Returns:
            The next call, or None.

        Raises:
            LeaseExpired: Somebody else holds the call.
            CallGone: The call was cancelled.
        """

    def interrupt(self, session_id: str, execution_id: str) -> None:
        """Stop an execution but keep the namespace; one that has ended is left alone."""

    def detach(self, session_id: str) -> None:
        """Let go of a session, which goes on.

        Raises:
            Fenced: Another client holds it.
        """

    def close_session(self, session_id: str, *, epoch: int | None = None, if_idle: bool = False) -> None:
        """End a session. Idempotent.

        Args:
            session_id: The session.
            epoch: The epoch that was seen last; None for this client's own.
            if_idle: Only where nothing runs.

        Raises:
            Fenced: Somebody attached since.
            SessionBusy: Something runs, and ``if_idle`` was asked for.
        """

    def close(self) -> None:
        """Close connections. Idempotent."""


class HttpBrokerClient:
    """A ``BrokerClient`` that speaks HTTP.

    Args:
        transport: How requests get there.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._epoch = 1
        self._lanes = LaneUser(transport)

    @property
    def transport(self) -> Transport:
        """How requests get there."""
        return self._transport

    def check(self) -> None:
        """See ``BrokerClient.check``."""
        health = _checked(self._transport.request("GET", "/v1/health", timeout_s=_PROMPT_S)).header
        spoken = health.get("protocol")
        if spoken != PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"the sandbox speaks version {spoken!r:.40} of the protocol, this package version {PROTOCOL_VERSION}",
                help="rebuild the image: rlm-sandbox image",
            )

    def open_session(
        self,
        name: str | None = None,
        secrets: Mapping[str, str] | None = None,
        *,
        keep: bool = False,
        ttl_s: float | None = None,
    ) -> str:
        """See ``BrokerClient.open_session``."""
        wanted = OpenRequest(name=name, secrets=secrets or {}, keep=keep, ttl_s=ttl_s, held_by=this_program())
        reply = _checked(self._transport.request("POST", "/v1/sessions", wanted.to_json(), timeout_s=_PROMPT_S))
        session_id = _read(lambda: Reader(reply.header, "session").text("session_id", max_chars=64))
        missed = _read(lambda: _what_was_missed(wanted, reply.header))
        if missed is not None:
            self.close_session(session_id)
            raise ProtocolMismatch(
                f"this sandbox does not know {missed}: it was started by an older version",
                help="start it anew: rlm-sandbox down, rlm-sandbox up",
            )
        return session_id

    def rehearse(self, session_id: str, timeout_s: float) -> None:
        """See ``BrokerClient.rehearse``.

        That is: connections, the execution's pipe, the lane, and the memory that a forked process gets of its own page
        by page as it writes to it. It spares the first two executions half of their time.
        """
        for tools in (_REHEARSED, ()):  # the lane is there from the second one on
            request = ExecuteRequest(execution_id=os.urandom(16).hex(), code="", tools=tools)
            wanted = ClaimRequest(limit=0, wait_s=timeout_s)
            news = self.execute(session_id, request, (), wanted, on_claims=lambda news: None)
            if news.progress.running:
                raise BrokerTimeout(f"the session has not run nothing within {timeout_s:g} s")

    def sessions(self, *, timeout_s: float = _PROMPT_S, memory: bool = False) -> list[SessionInfo]:
        """See ``BrokerClient.sessions``."""
        path = "/v1/sessions?memory=1" if memory else "/v1/sessions"
        reply = _checked(self._transport.request("GET", path, timeout_s=timeout_s))
        return _read(lambda: [_session(each) for each in Reader(reply.header, "sessions").items("sessions")])

    def attach(self, session_id: str, epoch: int) -> Attached:
        """See ``BrokerClient.attach``."""
        path = f"/v1/sessions/{_part(session_id)}/attach"
        body = {"epoch": epoch, "held_by": this_program().to_json()}
        reply = _checked(self._transport.request("POST", path, body, timeout_s=_PROMPT_S))
        attached = _read(lambda: Attached.from_json(reply.header))
        self._epoch = attached.epoch
        return attached

    def fork(self, session_id: str, count: int) -> list[str]:
        """See ``BrokerClient.fork``."""
        path = self._of_epoch(f"/v1/sessions/{_part(session_id)}/forks")
        reply = _checked(self._transport.request("POST", path, {"count": count}, timeout_s=_FORK_S))
        forked = _read(lambda: [_session(each) for each in Reader(reply.header, "forks").items("sessions")])
        if len(forked) != count:
            raise MalformedReply(f"the broker made {len(forked)} forks where {count} were asked for")
        return [session.session_id for session in forked]

    def snapshot(self, session_id: str, name: str | None) -> SnapshotInfo:
        """See ``BrokerClient.snapshot``."""
        path = self._of_epoch(f"/v1/sessions/{_part(session_id)}/snapshots")
        reply = _checked(self._transport.request("POST", path, {"name": name}, timeout_s=_FORK_S))
        return _read(lambda: _snapshot(reply.header))

    def snapshots(self, session_id: str) -> list[SnapshotInfo]:
        """See ``BrokerClient.snapshots``."""
        path = f"/v1/sessions/{_part(session_id)}/snapshots"
        reply = _checked(self._transport.request("GET", path, timeout_s=_PROMPT_S))
        return _read(lambda: [_snapshot(each) for each in Reader(reply.header, "snapshots").items("snapshots")])

    def drop_snapshot(self, session_id: str, snapshot_id: str) -> None:
        """See ``BrokerClient.drop_snapshot``."""
        path = self._of_epoch(f"/v1/sessions/{_part(session_id)}/snapshots/{_part(snapshot_id)}")
        _checked(self._transport.request("DELETE", path, timeout_s=_PROMPT_S))

    def roll_back(self, session_id: str, snapshot_id: str) -> None:
        """See ``BrokerClient.roll_back``."""
        path = self._of_epoch(f"/v1/sessions/{_part(session_id)}/rollback")
        _checked(self._transport.request("POST", path, {"snapshot_id": snapshot_id}, timeout_s=_FORK_S))
        self._lanes.forget()  # it led to the worker before

    def resolve(self, call_id: str, attempt: int, verdict: Verdict) -> None:
        """See ``BrokerClient.resolve``."""
        path = self._of_epoch(f"/v1/tool-calls/{_part(call_id)}/resolve")
        body = {"attempt": attempt, "state": verdict.value}
        _checked(self._transport.request("POST", path, body, timeout_s=_PROMPT_S))

    def execute(
        self,
        session_id: str,
        request: ExecuteRequest,
        blobs: Sequence[Blob | str],
        wanted: ClaimRequest,
        *,
        late_s: float = LATE_S,
        on_claims: Callable[[News], None] | None = None,
    ) -> News:
        """See ``BrokerClient.execute``."""
        path = f"/v1/sessions/{_part(session_id)}/executions?limit={wanted.limit}&wait_s={wanted.wait_s:.3f}"
        path = f"{path}&epoch={self._epoch}"
        size = sum(map(len, blobs))
        timeout_s = wanted.wait_s + late_s + _SEND_S_PER_BYTE * size
        in_frame = 0 if size >= WORTH_BYTES else size  # else in a file beside it
        if on_claims is not None and in_frame + len(request.code) <= limits.MAX_LANE_BYTES:
            news = self._by_lane(session_id, path, request, blobs, timeout_s, on_claims)
            if news is not None:
                return news
        return self._follow(path, request.to_json(), blobs, timeout_s, on_claims)

    def claim(
        self,
        session_id: str,
        wanted: ClaimRequest,
        *,
        late_s: float = LATE_S,
        on_claims: Callable[[News], None] | None = None,
    ) -> News:
        """See ``BrokerClient.claim``."""
        path = self._of_epoch(f"/v1/sessions/{_part(session_id)}/claims")
        return self._follow(path, wanted.to_json(), (), wanted.wait_s + late_s, on_claims)

    def answer(self, call_id: str, result: ToolResult, blobs: Sequence[Blob], *, claim: bool = False) -> News | None:
        """See ``BrokerClient.answer``."""
        timeout_s = _PROMPT_S + _SEND_S_PER_BYTE * sum(map(len, blobs))
        path = self._of_epoch(
            f"/v1/tool-calls/{quote(call_id, safe='')}/result"
        )  # each asked for once: nothing to keep
        if self._lanes.answer(call_id, f"POST {path}", result, blobs):
            return None
        path = f"{path}&claim=1" if claim else path
        reply = _checked(
            self._transport.request(
                "POST", path, result.to_json(), blobs, timeout_s=timeout_s, framed=True, together=True
            )
        )
        if not reply.header.get("claims"):
            return None
        return _news(reply._replace(header={"running": True, "claims": reply.header["claims"]}))

    def interrupt(self, session_id: str, execution_id: str) -> None:
        """See ``BrokerClient.interrupt``."""
        path = self._of_epoch(f"/v1/executions/{_part(execution_id)}/interrupt")
        _checked(self._transport.request("POST", path, {}, timeout_s=_PROMPT_S))

    def detach(self, session_id: str) -> None:
        """See ``BrokerClient.detach``."""
        path = self._of_epoch(f"/v1/sessions/{_part(session_id)}/detach")
        _checked(self._transport.request("POST", path, {}, timeout_s=_PROMPT_S))

    def close_session(self, session_id: str, *, epoch: int | None = None, if_idle: bool = False) -> None:
        """See ``BrokerClient.close_session``."""
        path = f"/v1/sessions/{_part(session_id)}?epoch={self._epoch if epoch is None else epoch}"
        path = f"{path}&idle=1" if if_idle else path
        reply = self._transport.request("DELETE", path, timeout_s=_PROMPT_S)
        if reply.status != _NOT_FOUND:
            _checked(reply)

    def close(self) -> None:
        """See ``BrokerClient.close``."""
        self._lanes.close()
        self._transport.close()

    def _by_lane(
        self,
        session_id: str,
        path: str,
        request: ExecuteRequest,
        blobs: Sequence[Blob | str],
        timeout_s: float,
        on_claims: Callable[[News], None],
    ) -> News | None:
        """Run an execution by the session's lane; None where it is to be posted in the ordinary way."""
        last: News | None = None

        def on_reply(reply: Reply) -> bool:
            nonlocal last
            news = _news(reply)
            if news.progress.more:
                on_claims(news)
                return False
            last = self._noted(news)
            return True

        def on_call(claim: Claim) -> None:
            on_claims(News(Progress(execution_id=claim.execution_id, running=True, claims=(claim,), more=True), ()))

        found = self._lanes.execute(session_id, path, request, blobs, timeout_s, on_reply, on_call)
        if isinstance(found, bool):
            return last
        result, received = found
        return News(Progress(execution_id=request.execution_id, running=False, result=result), received)

    def _follow(
        self,
        path: str,
        body: dict[str, Any],
        blobs: Sequence[Blob | str],
        timeout_s: float,
        on_claims: Callable[[News], None] | None,
    ) -> News:
        if on_claims is None:
            return self._noted(
                _news(self._transport.request("POST", path, body, blobs, timeout_s=timeout_s, framed=True))
            )

        def on_more(reply: Reply) -> None:
            on_claims(_news(reply))

        return self._noted(
            _news(
                self._transport.request(
                    "POST", f"{path}&stream=1", body, blobs, timeout_s=timeout_s, framed=True, on_more=on_more
                )
            )
        )

    def _noted(self, news: News) -> News:
        """Note whether the next execution may go by the lane."""
        if news.progress.result is not None:
            self._lanes.usable = news.progress.lane
        return news

    def _of_epoch(self, path: str) -> str:
        return f"{path}?epoch={self._epoch}"


def _what_was_missed(wanted: OpenRequest, data: Any) -> str | None:
    """Return what a broker did not make of a request to open a session, because it is too old for that."""
    read = Reader(data, "session")
    if sorted(read.texts("secrets", [])) != sorted(wanted.secrets):
        return "secrets"
    if read.flag("keep", False) != wanted.keep:
        return "sessions that stay"
    return None if read.optional_number("ttl_s") == wanted.ttl_s else "a session's time to live"


def _session(data: Any) -> SessionInfo:
    read = Reader(data, "session")
    return SessionInfo(
        session_id=read.text("session_id", max_chars=64),
        name=read.optional_text("name", max_chars=64),
        epoch=read.integer("epoch", low=1),
        lost=read.optional_text("lost", max_chars=200),
        secrets=tuple(read.texts("secrets", [])),
        running=read.optional_text("execution_id", max_chars=64),
        keep=read.flag("keep", False),
        ttl_s=read.optional_number("ttl_s"),
        held_by=HeldBy.optional(read),
        executions=read.integer("executions", 0),
        age_s=read.number("age_s", 0.0),
        idle_s=read.number("idle_s", 0.0),
        memory_bytes=read.integer("memory_bytes") if read.has("memory_bytes") else None,
    )


def _snapshot(data: Any) -> SnapshotInfo:
    read = Reader(data, "snapshot")
    return SnapshotInfo(
        snapshot_id=read.text("snapshot_id", max_chars=64),
        name=read.text("name", max_chars=64),
        taken_at=read.number("taken_at", 0.0, low=0.0, high=1e11),
        not_kept=tuple(text if text.isprintable() else ascii(text) for text in read.texts("not_kept", [])),
    )


def _news(reply: Reply) -> News:
    _checked(reply)
    try:
        progress = Progress.from_json(reply.header)
        blobs = reply.blobs if progress.result is None else raw_output.put_back(progress.result, reply.blobs)
    except BadRequest as error:
        raise _malformed(error) from None
    if progress.claims and any(
        not 0 <= first <= end <= len(blobs) for first, end in (c.blob_range for c in progress.claims)
    ):
        raise MalformedReply("a claim refers to blobs that did not come with it")
    return News(progress, blobs)


@functools.lru_cache(maxsize=256)
def _part(text: str) -> str:
    """Return an id of the broker's making as one part of a path."""
    return quote(text, safe="")


def _read(read: Callable[[], Answer]) -> Answer:
    try:
        return read()
    except BadRequest as error:
        raise _malformed(error) from None


def _malformed(error: BadRequest) -> MalformedReply:
    return MalformedReply(f"the broker's answer is malformed: {error}")


def _checked(reply: Reply) -> Reply:
    """Return the reply, or raise the error that it stands for."""
    if 200 <= reply.status < 300:
        return reply
    error = reply.header.get("error")
    code, message, reason = (_text(error, name) for name in ("code", "message", "reason"))
    message = message or f"the broker answered with status {reply.status}"
    if code == SessionLost.code:
        raise SessionLost(message, reason=reason or "unknown")
    if code == "unknown_session":
        raise SessionLost(message, reason="removed")
    raise _ERRORS.get(code, BrokerError)(message, status=reply.status)


def _text(error: Any, name: str) -> str:
    value = error.get(name) if isinstance(error, dict) else None
    return value[:_MAX_ERROR_CHARS] if isinstance(value, str) else ""


#: What the broker's codes are here; a call that it no longer knows ended long ago.
_ERRORS: dict[str, type[BrokerError]] = {
    SessionBusy.code: SessionBusy,
    LeaseExpired.code: LeaseExpired,
    Fenced.code: Fenced,
    SessionNameTaken.code: SessionNameTaken,
    CallGone.code: CallGone,
    "unknown_call": CallGone,
    UnknownSnapshot.code: UnknownSnapshot,
    TooManySnapshots.code: TooManySnapshots,
    TooManyForks.code: TooManyForks,
    ForkFailed.code: ForkFailed,
}
