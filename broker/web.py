"""What both Flask apps share: errors as JSON, nothing served by default, and who is asking."""

from __future__ import annotations

import math
from collections.abc import Mapping

from flask import Flask, Request, Response
from werkzeug.exceptions import HTTPException

from broker.bodies import error_reply
from broker.errors import BadRequest, BrokerError, InternalError, UnknownRoute, WrongMethod
from broker.logs import Log
from broker.protocol import reading
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


def query_number(
    query: Mapping[str, str], name: str, default: float, *, low: float = 0.0, high: float = 86_400.0
) -> float:
    """Read a number from the query string.

    Raises:
        BadRequest: Not a number, or out of range.
    """
    text = query.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise BadRequest(f"query: '{name}' must be a number between {low:g} and {high:g}")
    return number


def _http_error(error: HTTPException) -> Response:
    if error.code == 404:
        return error_reply(UnknownRoute("nothing is served under this path"))
    if error.code == 405:
        return error_reply(WrongMethod("this path does not take this method"))
    return error_reply(BadRequest(error.description or "malformed request"))
