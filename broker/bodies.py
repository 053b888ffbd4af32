"""HTTP bodies: JSON or a frame in, JSON or a frame out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from flask import Request, Response

from broker.errors import BadRequest, BrokerError, LengthRequired, PayloadTooLarge
from broker.protocol import limits
from broker.protocol.frames import (
    FRAME_CONTENT_TYPE,
    JSON_CONTENT_TYPE,
    Blob,
    FrameError,
    dump_frame,
    dump_json,
    load_frame,
    parse_json_object,
)

JsonObject = dict[str, Any]

#: Replies up to this size leave in one piece; copying so little costs less than another system call.
_JOIN_BYTES = 64 << 10


def body_length(request: Request, max_bytes: int) -> int:
    """Return the announced length of a body.

    Raises:
        LengthRequired: None is announced.
        PayloadTooLarge: More than ``max_bytes``.
    """
    length = request.content_length
    if length is None:
        raise LengthRequired("a body needs Content-Length")
    if length > max_bytes:
        raise PayloadTooLarge(f"a body of {length} bytes; this route takes {max_bytes}")
    return length


def read_body(request: Request, *, max_bytes: int = limits.MAX_FRAME_BYTES) -> tuple[JsonObject, Sequence[Blob], int]:
    """Read a body: its JSON object, its blobs (views, not copies), and its length in bytes.

    Raises:
        LengthRequired, PayloadTooLarge: See ``body_length``.
        BadRequest: Truncated, or neither a JSON object nor a frame.
    """
    length = body_length(request, max_bytes)
    try:
        data: bytes = request.environ["wsgi.input"].read(length)
    except OSError:  # pywsgi's way to say that the client went away
        data = b""
    if len(data) != length:
        raise BadRequest(f"the body ended before its {length} bytes had come")
    try:
        if request.environ.get("CONTENT_TYPE") == FRAME_CONTENT_TYPE:
            header, blobs = load_frame(data, max_bytes=max_bytes)
            return header, blobs, length
        if length > limits.MAX_HEADER_BYTES:
            raise PayloadTooLarge(f"JSON of {length} bytes; send large values as the blobs of a frame")
        return parse_json_object(data), (), length
    except FrameError as error:
        raise BadRequest(str(error)) from None


def read_optional_body(request: Request) -> JsonObject:
    """Read a small JSON body, or nothing at all as an empty object."""
    if not request.content_length:
        return {}
    return read_body(request, max_bytes=1 << 20)[0]


def reply(payload: JsonObject, blobs: Sequence[Blob] = (), *, status: int = 200) -> Response:
    """Return a reply: plain JSON, or a frame where there are blobs."""
    if not blobs:
        data = dump_json(payload)
        return _response([data], len(data), JSON_CONTENT_TYPE, status)
    pieces: Sequence[Blob] = dump_frame(payload, blobs)
    size = sum(len(piece) for piece in pieces)
    if size <= _JOIN_BYTES:
        pieces = [b"".join(pieces)]
    return _response(pieces, size, FRAME_CONTENT_TYPE, status)


def error_reply(error: BrokerError) -> Response:
    """Return the reply that an error makes."""
    return reply(error.to_json(), status=error.status)


def _response(pieces: Sequence[Blob], size: int, content_type: str, status: int) -> Response:
    response = Response(status=status, headers=[("Content-Type", content_type), ("Content-Length", str(size))])
    response.response = cast("list[bytes]", pieces)  # the server takes any bytes-like piece
    return response
