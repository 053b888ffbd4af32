"""One tool call from generated code: encode, post, wait, decode or raise."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

from broker.protocol import frames, limits
from broker.protocol.messages import CallState, ErrorInfo, ToolCallStatus
from broker.protocol.values import Decoder, Encoder, ValueNotSendable
from broker.worker.current import Current
from broker.worker.display import safe_str, type_name
from broker.worker.errors import BrokerGone, error_of
from broker.worker.guest_http import CallsCut, GuestPlane, Reply
from broker.worker.lane_calls import LaneCalls, Unanswered

_PENDING = (CallState.QUEUED, CallState.LEASED, CallState.STARTED)
_OK, _CREATED, _ACCEPTED = 200, 201, 202
# One encoder for all: json.dumps() with separators would build one for every call.
_to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class ToolCalls:
    """Calls tools of the host over the guest plane, from any thread and from forked children.

    Args:
        plane: The connections.
        current: What runs now.
    """

    def __init__(self, plane: GuestPlane, current: Current) -> None:
        self._plane = plane
        self._current = current
        #: Whether any tool was called through the broker since the worker set this to False.
        self.made = False
        #: Where the host has sent the running execution on the lane, and takes calls there.
        self.lane: LaneCalls | None = None
        #: The host's tools of now; a wrapper that code has kept may be of an older one, and the broker says so.
        self.known: frozenset[str] = frozenset()
        self._keys = itertools.count(1)

    def call(self, tool: str, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a tool and wait for its answer, however long it takes.

        Args:
            tool: Its name.
            names: Names of the positional parameters, for errors about ``args``.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Raises:
            TypeError: An argument cannot be sent; nothing was.
            RuntimeError: The execution has ended, or the broker is gone.
            Exception: What the tool raised; see ``errors.error_of``.
        """
        execution = self._current.require(f"{tool}()")
        if execution.interrupts or execution.submission is not None:
            raise RuntimeError(f"{tool}() was not called: this execution is being ended")
        body, sent = _request(execution.execution_id, tool, names, args, kwargs)
        try:
            status, blobs = self._begun(body, sent)
            while status.state in _PENDING:
                target = f"/v1/tool-calls/{status.call_id}?wait_s={limits.MAX_WAIT_S:g}"
                status, blobs = self._status(self._plane.request("GET", target))
        except CallsCut:
            raise RuntimeError(f"{tool}() was given up: its execution has ended") from None
        if status.state is CallState.DONE:
            return Decoder(blobs, arrays=True).decode(status.value)
        raise error_of(tool, status.state, status.error)

    def _begun(
        self, body: dict[str, Any], blobs: Sequence[frames.Blob | str]
    ) -> tuple[ToolCallStatus, Sequence[frames.Blob]]:
        """Make a call in the shortest way that there is; return where it stands."""
        lane = self.lane
        if lane is not None and not blobs and body["tool"] in self.known:
            key = f"{next(self._keys):x}"
            [frame] = frames.dump_frame({"type": "call", **body, "key": key})
            answer = lane.ask(bytes(frame), key) if len(frame) <= limits.MAX_LANE_BYTES else Unanswered.NOT_TOLD
            if isinstance(answer, dict):
                return ToolCallStatus.from_json({**answer, "call_id": key}), ()
            if answer is Unanswered.CUT:
                raise CallsCut
            if answer is not Unanswered.NOT_TOLD:
                self.made = True
                again = "&again=1" if answer is Unanswered.HOST_NOT_TOLD else ""
                target = f"/v1/tool-calls/{body['execution_id']}-{key}?wait_s={limits.MAX_WAIT_S:g}{again}"
                return self._status(self._plane.request("GET", target))
        self.made = True
        return self._status(self._plane.request("POST", "/v1/tool-calls", body, blobs))

    def cut_waits(self) -> None:
        """Wake the threads that wait for an answer; they raise RuntimeError."""
        self._plane.cut_waits()
        if self.lane is not None:
            self.lane.cut()

    def let_go(self) -> None:
        """Close the connections that a burst of calls has left open."""
        self._plane.let_go()

    def descriptors(self) -> list[int]:
        """Return the descriptors of the connections that are kept."""
        return self._plane.descriptors()

    def forget_connections(self) -> None:
        """In a forked child: start with connections of its own."""
        self._plane.forget()
        self.lane = None

    def _status(self, reply: Reply) -> tuple[ToolCallStatus, Sequence[frames.Blob]]:
        if reply.status not in (_OK, _CREATED, _ACCEPTED):
            raise _refusal(reply.status, reply.body)
        try:
            return ToolCallStatus.from_json(reply.body), reply.blobs
        except ValueError as error:
            raise BrokerGone(f"the sandbox's broker sent no tool call status ({reply.status}): {error}") from None


def _request(
    execution_id: str, tool: str, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Sequence[frames.Blob | str]]:
    encoder = Encoder(listify=True, lazy=True)
    try:
        sent_args = [encoder.encode(value, _path(names, i)) for i, value in enumerate(args)]
        sent_kwargs = {name: encoder.encode(value, f"argument {name!r}") for name, value in kwargs.items()}
    except ValueNotSendable as error:
        raise TypeError(f"{tool}() {error}") from None
    except Exception as error:
        raise TypeError(f"{tool}() failed to read an argument: {type_name(type(error))}: {safe_str(error)}") from error
    # The key is chosen here so that posting again after a broken connection asks for the same call.
    body = {
        "key": os.urandom(16).hex(),
        "execution_id": execution_id,
        "tool": tool,
        "args": sent_args,
        "kwargs": sent_kwargs,
        "wait_s": limits.MAX_WAIT_S,
    }
    size = sum(map(len, encoder.blobs))
    head_size = len(_to_json(body)) if size or _may_be_large(sent_args, sent_kwargs) else 0
    if size + head_size > limits.MAX_TOOL_CALL_BYTES or head_size > limits.MAX_HEADER_BYTES:
        raise TypeError(
            f"{tool}() was given {size + head_size:,} bytes of arguments; "
            f"at most {limits.MAX_TOOL_CALL_BYTES:,} can be sent"
        )
    return body, encoder.blobs


def _may_be_large(args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether any argument is a container: scalars and short strings need no measuring."""
    return any(isinstance(value, (list, dict)) for value in (*args, *kwargs.values()))


def _path(names: Sequence[str], position: int) -> str:
    return f"argument {names[position]!r}" if position < len(names) else f"argument {position + 1}"


def _refusal(status: int, body: dict[str, Any]) -> Exception:
    """The exception for a reply that is an error; the broker's own words where it sent some."""
    error = body.get("error")
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        kind = error.get("type")
        return error_of(
            "",
            CallState.FAILED,
            ErrorInfo(type=kind if isinstance(kind, str) else "RuntimeError", message=error["message"]),
        )
    text = next((body[key] for key in ("message", "error") if isinstance(body.get(key), str)), f"HTTP status {status}")
    return RuntimeError(f"the sandbox's broker refused the call: {text}")
