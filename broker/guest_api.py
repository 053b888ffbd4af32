"""The guest plane: generated code submits a tool call and reads its own result. Nothing else is routed here."""

from __future__ import annotations

from flask import Blueprint, Flask, Response, current_app, request

from broker.bodies import body_length, read_body, reply
from broker.family import Family
from broker.live_session import StatusWithBlobs
from broker.logs import Log
from broker.protocol import limits
from broker.protocol.blob_file import as_views
from broker.protocol.messages import ToolCallRequest
from broker.query import query_number
from broker.sessions import Sessions
from broker.web import connection_of, make_app, upgrade_required

guest_api = Blueprint("guest", __name__, url_prefix="/v1")


def make_guest_app(sessions: Sessions, log: Log) -> Flask:
    """Return the app of the guest plane."""
    app = make_app("guest", log)
    app.extensions["sessions"] = sessions
    app.extensions["log"] = log
    app.register_blueprint(guest_api)
    return app


@guest_api.post("/tool-calls")
def submit_tool_call() -> Response:
    """200: ToolCallStatus, after at most ``wait_s``. Body: ToolCallRequest.

    404 ``unknown_tool``; 409 ``execution_ended``; 413 ``payload_too_large``; 429 ``too_many_calls``.
    """
    family = _family()
    with family.receiving(body_length(request, limits.MAX_TOOL_CALL_BYTES)):
        header, blobs, size = read_body(request, max_bytes=limits.MAX_TOOL_CALL_BYTES)
    call = ToolCallRequest.from_json(header)
    return _status(family.running(call.execution_id).call_tool(call, blobs, size))


@guest_api.get("/tool-calls/<call_id>")
def read_tool_call(call_id: str) -> Response:
    """200: ToolCallStatus, after at most ``wait_s``. 404 ``unknown_call``, also for another session's.

    With ``again=1`` a started call is handed to its holder once more, as the same attempt.
    """
    session = _family().of_call(call_id)
    call = session.core.tool_calls.get(call_id)
    if "again" in request.args:
        session.offer_again(call)
    return _status(session.wait_for_call(call, query_number(request.args, "wait_s", 0.0)))


@guest_api.get("/frames")
def speak_frames() -> Response:
    """101: from here on the same requests in frames. 426 ``upgrade_required`` where it was not asked for."""
    raise upgrade_required()  # the server answers whoever asks for it


def _family() -> Family:
    sessions: Sessions = current_app.extensions["sessions"]
    return sessions.of_guest(connection_of(request).peer)


def _status(status: StatusWithBlobs) -> Response:
    return reply(status[0].to_json(), as_views(status[1]))
