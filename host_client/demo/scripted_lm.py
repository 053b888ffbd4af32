"""An OpenAI-compatible HTTP server on loopback whose model is a script.

DSPy talks to it through its real client (``dspy.LM("openai/...", api_base=...)``), so that everything
but the model's weights is real: HTTP, the chat format, retries, concurrency.

    with serve(lambda messages: "42") as server:
        lm = dspy.LM("openai/scripted", api_base=server.base_url, api_key="not-a-key", cache=False)
        lm("What is six times seven?")        # ["42"]
        server.requests[0].messages[-1].text  # "What is six times seven?"
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

log = logging.getLogger(__name__)

MODEL_NAME = "scripted"

#: A prompt of the demo is some 100 kB; nobody on loopback has a reason to send more than this.
MAX_REQUEST_BYTES = 64 << 20

# Rough, for the ``usage`` block only: English text and code have about four characters per token.
_CHARS_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One chat message; parts of a multi-part content are joined."""

    role: str
    text: str


class ScriptedModel(Protocol):
    """What plays the model. Called from several threads at once."""

    def __call__(self, messages: Sequence[Message], /) -> str:
        """Return the reply to a chat; an exception becomes an HTTP 500 with its text."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRequest:
    """One answered chat request; ``started_s`` is on the monotonic clock."""

    messages: tuple[Message, ...]
    reply: str
    started_s: float
    seconds: float


class BadChatRequest(ValueError):
    """The request's body is not a chat completion request."""


class ScriptedServer(http.server.ThreadingHTTPServer):
    """The server; made by ``serve``.

    Args:
        model: What answers.
        think_s: Seconds to wait before an answer, by chat; lets a person follow. None for none.
    """

    daemon_threads = True
    # Sub-queries come in bursts of some tens of connections; the default backlog of 5 would refuse a few.
    request_queue_size = 128

    def __init__(self, model: ScriptedModel, think_s: Callable[[Sequence[Message]], float] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.think_s = think_s
        self.requests: list[RecordedRequest] = []
        self._stopping = threading.Event()

    @property
    def base_url(self) -> str:
        """The URL to give as ``api_base``."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, messages: tuple[Message, ...]) -> str:
        """Ask the model and record the exchange."""
        started_s = time.monotonic()
        if self.think_s is not None:
            self._stopping.wait(self.think_s(messages))
        reply = self.model(messages)
        seconds = time.monotonic() - started_s
        self.requests.append(RecordedRequest(messages=messages, reply=reply, started_s=started_s, seconds=seconds))
        return reply

    def stop(self) -> None:
        """Stop answering, wake thinking requests and close the socket."""
        self._stopping.set()
        self.shutdown()
        self.server_close()


@contextlib.contextmanager
def serve(
    model: ScriptedModel, *, think_s: Callable[[Sequence[Message]], float] | None = None
) -> Iterator[ScriptedServer]:
    """Serve a scripted model on a free loopback port until the block ends."""
    server = ScriptedServer(model, think_s)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="scripted-lm")
    thread.start()
    try:
        with loopback_without_proxy():
            yield server
    finally:
        server.stop()
        thread.join()


@contextlib.contextmanager
def loopback_without_proxy() -> Iterator[None]:
    """Keep HTTP clients from sending loopback requests to a proxy that the environment names."""
    before = {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}
    for name, value in before.items():
        os.environ[name] = ",".join(filter(None, [value, "127.0.0.1"]))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer
    # Head and body leave in one segment: sent as two, the second waits 40 ms for a delayed acknowledgement.
    wbufsize = 1 << 16

    def do_GET(self) -> None:
        if self.path.rstrip("/") != "/v1/models":
            return self._error(404, f"no such path: {self.path}")
        return self._reply(200, {"object": "list", "data": [{"id": MODEL_NAME, "object": "model"}]})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self._error(404, f"no such path: {self.path}")
        try:
            request = _read_request(body)
        except BadChatRequest as error:
            return self._error(400, str(error))
        try:
            replies = [self.server.answer(request.messages) for _ in range(request.choices)]
        except Exception as error:
            log.exception("the scripted model failed")
            return self._error(500, f"the scripted model failed: {type(error).__name__}: {error}")
        return self._reply(200, _completion(request, replies))

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= MAX_REQUEST_BYTES:
            self.close_connection = True
            return b""
        return self.rfile.read(length)

    def _error(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._reply(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})

    def _reply(self, status: int, data: dict[str, Any]) -> None:
        payload = json.dumps(data).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def handle_one_request(self) -> None:
        # A client that gave up in the meantime (Ctrl-C) is no news.
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        log.debug(format, *args)


@dataclasses.dataclass(frozen=True, slots=True)
class _ChatRequest:
    model: str
    messages: tuple[Message, ...]
    choices: int


def _read_request(body: bytes) -> _ChatRequest:
    try:
        data = json.loads(body)
    except ValueError as error:
        raise BadChatRequest(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("messages"), list) or not data["messages"]:
        raise BadChatRequest("'messages' must be a non-empty list")
    if data.get("stream"):
        raise BadChatRequest("'stream' is not supported by the scripted model")
    choices = data.get("n") or 1
    if not isinstance(choices, int) or not 1 <= choices <= 128:
        raise BadChatRequest("'n' must be between 1 and 128")
    return _ChatRequest(
        model=str(data.get("model", MODEL_NAME)),
        messages=tuple(_read_message(message) for message in data["messages"]),
        choices=choices,
    )


def _read_message(data: Any) -> Message:
    if not isinstance(data, dict) or not isinstance(data.get("role"), str):
        raise BadChatRequest("each message must be an object with a 'role'")
    content = data.get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return Message(data["role"], str(content))


def _completion(request: _ChatRequest, replies: Sequence[str]) -> dict[str, Any]:
    prompt_tokens = sum(len(message.text) for message in request.messages) // _CHARS_PER_TOKEN
    completion_tokens = sum(map(len, replies)) // _CHARS_PER_TOKEN
    return {
        "id": f"chatcmpl-scripted-{time.monotonic_ns()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [
            {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
            for index, reply in enumerate(replies)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
