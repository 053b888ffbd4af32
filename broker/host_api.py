"""The host plane: sessions, executions, claims, results. Handlers unpack, delegate, pack."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable
from typing import Any

from flask import Blueprint, Flask, Response, current_app, request

import broker
from broker import host_requests, protocol
from broker.bodies import read_body, read_optional_body, reply
from broker.errors import LeaseExpired, SessionBusy
from broker.live_session import LiveSession, WithBlobs
from broker.logs import Log
from broker.protocol import limits
from broker.protocol.blob_file import as_views
from broker.protocol.messages import HeldBy, OpenRequest, Verdict
from broker.protocol.opening import MAX_NAME_CHARS
from broker.protocol.reading import Reader
from broker.protocol.self_test import SelfTest
from broker.query import query_number
from broker.sessions import Sessions
from broker.tool_calls import ToolCall
from broker.web import connection_of, make_app, upgrade_required

JsonObject = dict[str, Any]

host_api = Blueprint("host", __name__, url_prefix="/v1")


@dataclasses.dataclass(frozen=True, slots=True)
class HostPlane:
    """What the handlers of this plane work on."""

    sessions: Sessions
    log: Log
    name: str | None
    started_at: float
    connections: Callable[[], int]
    self_test: Callable[[], SelfTest]


def make_host_app(
    sessions: Sessions,
    log: Log,
    *,
    name: str | None,
    connections: Callable[[], int] = lambda: 1,
    self_test: Callable[[], SelfTest] = SelfTest,
) -> Flask:
    """Return the app of the host plane.

    Args:
        sessions: What it is about.
        log: For defects.
        name: The sandbox's.
        connections: Returns how many connections hosts hold.
        self_test: Returns what the sandbox found out about itself; may wait for it.
    """
    app = make_app("host", log)
    app.extensions["plane"] = HostPlane(sessions, log, name, time.monotonic(), connections, self_test)
    app.register_blueprint(host_api)
    return app


@host_api.get("/health")
def health() -> Response:
    """200: that the broker answers, and which protocol it speaks."""
    plane = _plane()
    return reply(
        {
            "protocol": protocol.PROTOCOL_VERSION,
            "version": broker.__version__,
            "python": platform.python_version(),
            "state": "ok",
            "sessions": len(plane.sessions),
            "uptime_s": round(time.monotonic() - plane.started_at, 3),
            "name": plane.name,
            "connections": plane.connections(),
        }
    )


@host_api.get("/self-test")
def self_test() -> Response:
    """200: SelfTest, what the sandbox found out about its isolation when it started."""
    return reply(_plane().self_test().to_json())


@host_api.post("/sessions")
def open_session() -> Response:
    """201: a new session. Body: OpenRequest or none. 409 ``session_name_taken``; 429 ``too_many_sessions``; 503."""
    wanted = OpenRequest.from_json(read_optional_body(request))
    return reply(_describe(_plane().sessions.open(wanted)), status=201)


@host_api.get("/sessions")
def list_sessions() -> Response:
    """200: every session that was opened and not closed, lost ones too. Query: ``memory`` (0), 1 to have it read."""
    sessions = _plane().sessions
    described = [_describe(session) for session in sessions]
    if query_number(request.args, "memory", 0) != 0:
        for each in described:
            each["memory_bytes"] = sessions.memory_bytes(sessions[each["session_id"]])
    return reply({"sessions": described})


@host_api.get("/sessions/<session_id>")
def show_session(session_id: str) -> Response:
    """200: one session. 404 ``unknown_session``."""
    return reply(_describe(_plane().sessions[session_id]))


@host_api.post("/sessions/<session_id>/attach")
def attach(session_id: str) -> Response:
    """200: Attached; the session is the caller's. Body: Attach or none. 409 ``fenced``; 410 ``session_lost``."""
    session = _plane().sessions[session_id]
    read = Reader(read_optional_body(request), "attach")
    expected = read.integer("epoch", low=1) if read.has("epoch") else None
    return reply(session.attach(expected, HeldBy.optional(read)).to_json())


@host_api.post("/sessions/<session_id>/detach")
def detach(session_id: str) -> Response:
    """200: the session, which nobody holds now. 404 ``unknown_session``; 409 ``fenced``."""
    read_optional_body(request)
    session = _plane().sessions[session_id]
    _check_epoch(session)
    session.detach()
    return reply(_describe(session))


@host_api.delete("/sessions/<session_id>")
def close_session(session_id: str) -> Response:
    """200: its processes and files are gone. 404 ``unknown_session``; 409 ``fenced``, ``session_busy`` (``idle=1``)."""
    session = _plane().sessions[session_id]
    _check_epoch(session)
    if query_number(request.args, "idle", 0) != 0:
        session.catch_up()
    if query_number(request.args, "idle", 0) != 0 and session.core.running is not None:
        raise SessionBusy(f"the execution {session.core.running.execution_id} is running in this session")
    _plane().sessions.close(session_id)
    return reply({"session_id": session_id, "state": "closed"})


@host_api.post("/sessions/<session_id>/forks")
def fork_session(session_id: str) -> Response:
    """201: sessions that begin with its namespace. Body: ``{"count"}`` or none. 409 ``session_busy``; 429; 503."""
    session = _held(session_id)
    count = Reader(read_optional_body(request), "fork").integer("count", 1, low=1, high=limits.MAX_FAMILY)
    made = _plane().sessions.fork(session, count)
    return reply({"sessions": [_describe(each) for each in made]}, status=201)


@host_api.post("/sessions/<session_id>/snapshots")
def take_snapshot(session_id: str) -> Response:
    """201: a Snapshot. Body: ``{"name"}`` or none. 409 ``session_busy``; 429 ``too_many_snapshots``; 503."""
    session = _held(session_id)
    name = Reader(read_optional_body(request), "snapshot").optional_text("name", max_chars=MAX_NAME_CHARS)
    return reply(_plane().sessions.snapshot(session, name).to_json(), status=201)


@host_api.get("/sessions/<session_id>/snapshots")
def list_snapshots(session_id: str) -> Response:
    """200: the snapshots of a session, oldest first. 404 ``unknown_session``."""
    return reply({"snapshots": [each.to_json() for each in _plane().sessions[session_id].snapshots]})


@host_api.delete("/sessions/<session_id>/snapshots/<snapshot_id>")
def drop_snapshot(session_id: str, snapshot_id: str) -> Response:
    """200: it is dropped, or was. 404 ``unknown_session``; 409 ``fenced``."""
    _held(session_id).snapshots.drop(snapshot_id)
    return reply({"snapshot_id": snapshot_id, "state": "dropped"})


@host_api.post("/sessions/<session_id>/rollback")
def roll_back(session_id: str) -> Response:
    """200: the session, its namespace as it was. Body: ``{"snapshot_id"}``. 404 ``unknown_snapshot``; 409; 503."""
    session = _held(session_id)
    snapshot_id = Reader(read_body(request, max_bytes=1 << 20)[0], "rollback").text("snapshot_id", max_chars=64)
    _plane().sessions.roll_back(session, snapshot_id)
    return reply(_describe(session))


@host_api.post("/sessions/<session_id>/executions")
def execute(session_id: str) -> Response:
    """200: Progress. Body: ExecuteRequest. 409 ``session_busy``, ``fenced``; 410 ``session_lost``."""
    session = _plane().sessions[session_id]
    header, blobs, _ = read_body(request)
    still_there = connection_of(request).still_there
    return _progress(host_requests.execute(session, request.args, header, blobs, still_there))


@host_api.post("/sessions/<session_id>/claims")
def claim_tool_calls(session_id: str) -> Response:
    """200: Progress, as soon as there are claims or the execution has ended. Body: ClaimRequest."""
    session = _plane().sessions[session_id]
    body = read_body(request, max_bytes=limits.MAX_HEADER_BYTES)[0]
    return _progress(host_requests.claim(session, request.args, body, connection_of(request).still_there))


@host_api.get("/executions/<execution_id>")
def show_execution(execution_id: str) -> Response:
    """200: Progress without claims, after at most ``wait_s``. 404 ``unknown_execution``."""
    session, execution = _plane().sessions.execution(execution_id)
    return _progress(session.wait_for_end(execution, query_number(request.args, "wait_s", 0.0)))


@host_api.post("/executions/<execution_id>/interrupt")
def interrupt_execution(execution_id: str) -> Response:
    """200: Progress; the interrupt is on its way, or the execution had ended. 404 ``unknown_execution``."""
    read_optional_body(request)
    session, execution = _plane().sessions.execution(execution_id)
    _check_epoch(session)
    return _progress(session.interrupt(execution))


@host_api.get("/tool-calls/<call_id>")
def show_tool_call(call_id: str) -> Response:
    """200: where a call stands. 404 ``unknown_call``."""
    session, call = _plane().sessions.tool_call(call_id)
    session.catch_up()
    return reply(_describe_call(session, call))


@host_api.post("/tool-calls/<call_id>/start")
def start_tool_call(call_id: str) -> Response:
    """200: the host may run the tool now. Body: ``{"attempt"}``. 409 ``lease_expired``; 410 ``call_gone``."""
    attempt = Reader(read_body(request, max_bytes=1 << 20)[0], "start").integer("attempt", low=1)
    session = _holder(call_id)
    return reply(_describe_call(session, session.core.tool_calls.start(call_id, attempt)))


@host_api.post("/tool-calls/<call_id>/resolve")
def resolve_tool_call(call_id: str) -> Response:
    """200: done. Body: ``{"attempt", "state": "queued" | "unknown"}``. 409 ``lease_expired``; 410 ``call_gone``."""
    read = Reader(read_body(request, max_bytes=1 << 20)[0], "resolve")
    attempt, verdict = read.integer("attempt", low=1), read.member("state", Verdict)
    session = _holder(call_id)
    return reply(_describe_call(session, session.resolve_call(call_id, attempt, verdict)))


@host_api.post("/tool-calls/<call_id>/heartbeat")
def renew_lease(call_id: str) -> Response:
    """200: the lease is prolonged. Body: ``{"attempt", "lease_s"}``. 409 ``lease_expired``."""
    read = Reader(read_body(request, max_bytes=1 << 20)[0], "heartbeat")
    attempt = read.integer("attempt", low=1)
    lease_s = read.number("lease_s", limits.DEFAULT_LEASE_S, low=0.01, high=86_400)
    session, call = _plane().sessions.tool_call(call_id)
    _check_epoch(session)
    if not session.renew_call(call_id, attempt, lease_s):
        raise LeaseExpired(f"attempt {attempt} does not hold the call {call_id}, which is {call.state.value}")
    return reply(_describe_call(session, call))


@host_api.post("/tool-calls/<call_id>/result")
def answer_tool_call(call_id: str) -> Response:
    """200: stored. Body: ToolResult. 404 ``unknown_call``; 409 ``lease_expired``; 410 ``call_gone``."""
    header, blobs, size = read_body(request, max_bytes=limits.MAX_TOOL_CALL_BYTES)
    answered = host_requests.answer(_plane().sessions, call_id, request.args, header, blobs, size)
    return reply(_describe_call(*answered))


@host_api.get("/frames")
def speak_frames() -> Response:
    """101: from here on the most frequent requests in frames. 426 ``upgrade_required`` where it was not asked for."""
    raise upgrade_required()  # the server answers whoever asks for it


def _check_epoch(session: LiveSession) -> None:
    host_requests.check_epoch(session, request.args)


def _held(session_id: str) -> LiveSession:
    """Return a session, whose holder must be asking."""
    session = _plane().sessions[session_id]
    _check_epoch(session)
    return session


def _holder(call_id: str) -> LiveSession:
    """Return the session of a call, whose holder must be asking."""
    session, _ = _plane().sessions.tool_call(call_id)
    _check_epoch(session)
    return session


def _plane() -> HostPlane:
    plane: HostPlane = current_app.extensions["plane"]
    return plane


def _progress(progress: WithBlobs) -> Response:
    return reply(progress[0].to_json(), as_views(progress[1]))


def _describe(session: LiveSession) -> JsonObject:
    session.catch_up()  # whoever asks may know already what is to be read
    core = session.core
    return {
        "session_id": core.session_id,
        "name": core.name,
        "secrets": list(core.secret_names),
        "epoch": core.epoch,
        "slot": core.slot,
        "state": "lost" if core.lost is not None else "idle" if core.running is None else "running",
        "lost": core.lost,
        "execution_id": None if core.running is None else core.running.execution_id,
        "age_s": round(core.age_s(), 3),
        "idle_s": round(core.idle_s(), 3),
        "keep": core.keep,
        "ttl_s": core.idleness.ttl_s,
        "held_by": None if core.held_by is None else core.held_by.to_json(),
        "executions": core.executed,
        "forked_from": session.forked_from,
    }


def _describe_call(session: LiveSession, call: ToolCall) -> JsonObject:
    return {
        "call_id": call.call_id,
        "state": call.state.value,
        "attempt": call.attempt,
        "tool": call.request.tool,
        "execution_id": call.request.execution_id,
        "session_id": session.core.session_id,
    }
