"""What both Flask apps share: errors as JSON, nothing served by default, and who is asking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def upgrade_to_frames(request: Request, serve: Callable[[Any], None], protocol: str = FRAMED_UPGRADE) -> Response:
    """Return the reply after which the connection speaks frames.

    Args:
        request: Must ask for it in its ``Upgrade`` header.
        serve: Called with the connection's socket once the reply is sent; the connection ends when it returns.
        protocol: What it must ask for.

    Raises:
        UpgradeRequired: It did not ask.
    """
    if request.headers.get("Upgrade", "").lower() != protocol:
        raise UpgradeRequired(f"ask with 'Connection: Upgrade' and 'Upgrade: {protocol}'")
    connection_of(request).upgraded = serve
    response = Response(status=101, headers=[("Connection", "Upgrade"), ("Upgrade", protocol)])
    del response.headers["Content-Type"]  # there is no body
    return response


def _http_error(error: HTTPException) -> Response:
    if error.code == 404:
        return error_reply(UnknownRoute("nothing is served under this path"))
    if error.code == 405:
        return error_reply(WrongMethod("this path does not take this method"))
    return error_reply(BadRequest(error.description or "malformed request"))
