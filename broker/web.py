"""What both Flask apps share: errors as JSON, nothing served by default, and who is asking."""

from __future__ import annotations

from flask import Flask, Request, Response
from werkzeug.exceptions import HTTPException

from broker.bodies import error_reply
from broker.errors import BadRequest, BrokerError, InternalError, UnknownRoute, UpgradeRequired, WrongMethod
from broker.logs import Log
from broker.protocol import reading
from broker.protocol.frames import FRAMED_UPGRADE
from broker.unix_server import Connection

#: Key of the WSGI environment under which the server puts the connection.
CONNECTION = "rlm_sandbox.connection"


def make_app(name: str, log: Log) -> Flask:
    """Return a Flask app that answers every error in JSON and serves nothing by itself."""
    app = Flask(name, static_folder=None, template_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.register_error_handler(BrokerError, error_reply)
    app.register_error_handler(reading.BadRequest, lambda error: error_reply(BadRequest(str(error))))
    app.register_error_handler(HTTPException, _http_error)

    def defect(error: Exception) -> Response:
        log.defect(name, error)
        return error_reply(InternalError("a defect of the broker; the sandbox's log says more"))

    app.register_error_handler(Exception, defect)
    return app


def connection_of(request: Request) -> Connection:
    """Return the connection that a request came on."""
    connection: Connection = request.environ[CONNECTION]
    return connection


def upgrade_required() -> UpgradeRequired:
    """Return the error for a request of ``/v1/frames`` that asks for no protocol which the server speaks."""
    return UpgradeRequired(f"ask with 'Connection: Upgrade' and 'Upgrade: {FRAMED_UPGRADE}'")


def _http_error(error: HTTPException) -> Response:
    if error.code == 404:
        return error_reply(UnknownRoute("nothing is served under this path"))
    if error.code == 405:
        return error_reply(WrongMethod("this path does not take this method"))
    return error_reply(BadRequest(error.description or "malformed request"))
