"""When an execution goes by the lane, and what is done where the lane fails: see ``lane`` for how."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from broker.protocol import limits, raw_output
from broker.protocol.blob_file import BlobFile, as_bytes
from broker.protocol.frames import Blob, FrameError, dump_frame
from broker.protocol.messages import (
    CallState,
    Claim,
    ExecuteRequest,
    ExecutionResult,
    ToolCallRequest,
    ToolResult,
    lane_call_id,
)
from broker.protocol.reading import BadRequest
from host_client.http_wire import BadReply
from host_client.lane import LEAST_TIMEOUT_S, Lane
from host_client.transport import BrokerTimeout, Reply, Transport, read_reply

_OPEN_S = 5.0
#: A lane that breaks so often is of no use to this session: its code closes it on purpose.
_MOST_BREAKS = 5

#: Of calls that wait for an answer; their arguments are held here, where the broker would hold them else.
_MOST_OPEN_BYTES = 4 << 20
#: More variables than this take so long themselves that it does not matter which way they go.
_MOST_FILE_BYTES = 64 << 20

Worker = tuple[ExecutionResult, Sequence[Blob]]


class _Call(NamedTuple):
    """A tool call that came on a lane."""

    lane: Lane
    key: str
    size: int


class LaneUser:
    """Sends the executions of one session by its lane, from the second one on, where the broker allows it.

    Args:
        transport: How the broker is reached.

    Attributes:
        usable: Whether the broker's last word on an execution's end, if it was the broker's, allows it: broker and
            worker go on with the same pipe.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        # Held by the one thread whose execution is under way. Guards the three below; the flags are set by anybody.
        self._lock = threading.Lock()
        self._session_id: str | None = None
        self._lane: Lane | None = None
        self._breaks = 0
        self._closed = self._over = False
        self.usable = False
        # Guards the two below: the running execution's calls that came on its lane and were not answered yet.
        self._calls_lock = threading.Lock()
        self._calls: dict[str, _Call] = {}
        self._open_bytes = 0

    def execute(
        self,
        session_id: str,
        path: str,
        request: ExecuteRequest,
        blobs: Sequence[Blob | str],
        timeout_s: float,
        on_reply: Callable[[Reply], bool],
        on_call: Callable[[Claim], None],
    ) -> Worker | bool:
        """Run an execution by the lane.

        Args:
            session_id: The session.
            path: The request to the broker.
            request: The execution.
            blobs: Raw parts of its variables.
            timeout_s: For the whole exchange, in seconds.
            on_reply: Takes each reply of the broker, and tells whether it was the last one.
            on_call: Takes each tool call that comes on the lane.

        Returns:
            The worker's result with its blobs; True where the broker has answered; False where the execution is to be
            posted in the ordinary way, which does no harm where it has run.

        Raises:
            BrokerTimeout: Nobody answered in time.
            SandboxError: What ``on_reply`` raises.
        """
        if request.timeout_s is not None and request.timeout_s < LEAST_TIMEOUT_S:
            return False
        alone = False
        try:
            alone = self._lock.acquire(blocking=False)
            lane = self._ready(session_id, path) if alone else None
            with self._calls_lock:  # of the execution before: whoever still answers those asks the broker
                self._calls, self._open_bytes = {}, 0
            return lane is not None and self._run(lane, path, request, blobs, timeout_s, on_reply, on_call)
        finally:
            if alone:
                self._lock.release()
            if self._over:
                self._drop_if_idle()

    def forget(self) -> None:
        """Use another lane from the next execution on."""
        self.usable, self._over = False, True
        self._drop_if_idle()

    def close(self) -> None:
        """Close the lane, at the latest when the execution on it has ended. Idempotent."""
        self._closed = True
        self.forget()

    def _drop_if_idle(self) -> None:
        """End the lane unless an execution is under way, which will see to it."""
        if self._lock.acquire(blocking=False):
            try:
                self._drop()
                self._over = False
            finally:
                self._lock.release()

    def _ready(self, session_id: str, path: str) -> Lane | None:
        if self._lane is not None and (self._lane.pid != os.getpid() or self._session_id != session_id):
            self._drop()
            self._session_id = None
        if self._session_id != session_id:
            self._session_id, self._breaks, self.usable = session_id, 0, False
        if not self.usable:
            return None
        if self._lane is None and self._breaks < _MOST_BREAKS and not self._closed:
            epoch = path.rpartition("&epoch=")[2]
            self._lane = self._transport.open_lane(
                f"/v1/sessions/{quote(session_id, safe='')}/lane?epoch={epoch}", _OPEN_S
            )
            if self._lane is None:
                self._breaks = _MOST_BREAKS
        return self._lane

    def _run(
        self,
        lane: Lane,
        path: str,
        request: ExecuteRequest,
        blobs: Sequence[Blob | str],
        timeout_s: float,
        on_reply: Callable[[Reply], bool],
        on_call: Callable[[Claim], None],
    ) -> Worker | bool:
        size = sum(map(len, blobs))
        # The file goes to both: the broker may have to bring it after all.
        file = BlobFile.worth(blobs) if size <= _MOST_FILE_BYTES else None
        if file is None and size > limits.MAX_LANE_BYTES:
            return False
        announcement = {
            "request": f"POST {path}&stream=1&lane=1",
            "body": request.to_json(),
            raw_output.ASKED: True,
        }
        prints = min(request.max_output_bytes, limits.MAX_LANE_OUTPUT_BYTES)
        execution = {
            **request.to_worker(),
            "pipe": "kept",
            "calls": True,
            "output_bytes": prints,
            "sent_at": time.monotonic(),
        }
        parts: Sequence[Blob] = ()
        if file is not None:
            in_file: dict[str, Any] = {"file": True, "blobs": file.lengths}
            announcement |= in_file
            execution |= in_file
        else:
            parts = as_bytes(blobs)

        goes_on = False

        def on_frame(header: dict[str, Any], blobs: Sequence[Blob]) -> bool:
            nonlocal goes_on
            reply = read_reply(header, blobs)
            goes_on = reply.header.get("running") is True
            return on_reply(reply)

        def on_called(header: dict[str, Any], size: int) -> None:
            self._called(lane, ToolCallRequest.from_json(header), size, on_call)

        try:
            announced, told = dump_frame(announcement, parts), dump_frame(execution, parts)
            if max(sum(map(len, announced)), sum(map(len, told))) > limits.MAX_LANE_BYTES:
                return False
            found = lane.run(announced, told, file, request.execution_id, timeout_s, on_frame, on_called)
            if found is None:
                if goes_on:  # and is asked about by requests of its own: the worker must not call here any more
                    lane.take_calls(request.execution_id, on_called)
                    self._drop()
                return True
            header, received, took_s = found
            result = ExecutionResult.reported(header)
            result.duration_s = round(took_s, 6)
            return result, received
        except TimeoutError:
            self._drop()
            raise BrokerTimeout(f"the broker did not answer POST {path} within {timeout_s:.1f} s") from None
        except (OSError, BadReply, FrameError, BadRequest):
            self._breaks += 1
            self._drop()
            return False
        except BaseException:
            self._drop()
            raise
        finally:
            if file is not None:
                file.close()

    def _called(self, lane: Lane, call: ToolCallRequest, size: int, on_call: Callable[[Claim], None]) -> None:
        """Hand a tool call over that the worker has made on the lane, where there is room for one more."""
        call_id = lane_call_id(call)
        with self._calls_lock:
            fits = len(self._calls) < limits.MAX_PENDING_TOOL_CALLS and self._open_bytes + size <= _MOST_OPEN_BYTES
            if fits:
                self._calls[call_id] = _Call(lane, call.key, size)
                self._open_bytes += size
        if not fits:
            lane.tell(dump_frame({"type": "answer", "key": call.key, "told": "refused"}))
            return
        claim = Claim(
            call_id=call_id,
            attempt=1,
            tool=call.tool,
            args=call.args,
            kwargs=call.kwargs,
            execution_id=call.execution_id,
            lease_s=limits.DEFAULT_LEASE_S,
            key=call_id,
        )
        on_call(claim)

    def answer(self, call_id: str, request: str, result: ToolResult, blobs: Sequence[Blob]) -> bool:
        """Answer a call that came on the lane, on the same way, if it is one and still can be; from any thread.

        Args:
            call_id: The call.
            request: What the broker is to be asked.
            result: The answer.
            blobs: Raw parts of its value.
        """
        with self._calls_lock:
            call = self._calls.pop(call_id, None)
            if call is None:
                return False
            self._open_bytes -= call.size
        lane, key, _ = call
        body = result.to_json()
        answer: Sequence[Blob] = ()
        if not blobs:
            state = CallState.DONE if result.error is None else CallState.FAILED
            answer = dump_frame({"type": "answer", "key": key, "state": state.value, **body})
            if len(answer[0]) <= limits.MAX_LANE_BYTES and lane.answer(
                dump_frame({"request": request, "body": body, "aside": True}), answer
            ):
                return True
        lane.tell(dump_frame({"type": "answer", "key": key}))  # the broker brings it
        return False

    def _drop(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.close()
