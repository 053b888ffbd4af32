"""When an execution goes by the lane, and what is done where the lane fails: see ``lane`` for how."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from broker.protocol.frames import Blob, FrameError, dump_frame
from broker.protocol.messages import ExecuteRequest, ExecutionResult
from broker.protocol.reading import BadRequest
from host_client.http_wire import BadReply
from host_client.lane import LEAST_TIMEOUT_S, MOST_BYTES, Lane
from host_client.transport import BrokerTimeout, Reply, Transport, read_reply

_OPEN_S = 5.0
#: A lane that breaks so often is of no use to this session: its code closes it on purpose.
_MOST_BREAKS = 5

Worker = tuple[ExecutionResult, Sequence[Blob]]


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

    def execute(
        self,
        session_id: str,
        path: str,
        request: ExecuteRequest,
        blobs: Sequence[Blob],
        timeout_s: float,
        on_reply: Callable[[Reply], bool],
    ) -> Worker | bool:
        """Run an execution by the lane.

        Args:
            session_id: The session.
            path: The request to the broker.
            request: The execution.
            blobs: Raw parts of its variables.
            timeout_s: For the whole exchange, in seconds.
            on_reply: Takes each reply of the broker, and tells whether it was the last one.

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
            return lane is not None and self._run(lane, path, request, blobs, timeout_s, on_reply)
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
        blobs: Sequence[Blob],
        timeout_s: float,
        on_reply: Callable[[Reply], bool],
    ) -> Worker | bool:
        announcement = {"request": f"POST {path}&stream=1&lane=1", "body": request.to_json()}
        execution = {**request.to_worker(), "pipe": "kept", "sent_at": time.monotonic()}

        def on_frame(header: dict[str, Any], blobs: Sequence[Blob]) -> bool:
            return on_reply(read_reply(header, blobs))

        announced, told = dump_frame(announcement, blobs), dump_frame(execution, blobs)
        if max(sum(map(len, announced)), sum(map(len, told))) > MOST_BYTES:
            return False
        try:
            found = lane.run(announced, told, request.execution_id, timeout_s, on_frame)
            if found is None:
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

    def _drop(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.close()


__all__ = ["MOST_BYTES", "LaneUser"]
