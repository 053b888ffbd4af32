"""The worker's loop: a frame in, an execution, a frame out."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from broker.protocol import limits
from broker.protocol.frames import Blob, dump_frame
from broker.protocol.messages import OutputField, ToolDefinition
from broker.worker import branching
from broker.worker.capture import Capture
from broker.worker.channel import Channel, FrameTooLarge
from broker.worker.current import Current, Execution
from broker.worker.guest_http import GuestPlane
from broker.worker.inbox import Inbox
from broker.worker.interrupts import Interrupts
from broker.worker.lane_calls import LaneCalls
from broker.worker.proxies import Proxies
from broker.worker.repl import Ending, Repl
from broker.worker.submit import Submit
from broker.worker.threads import ThreadTags
from broker.worker.tool_calls import ToolCalls


def run(channel: socket.socket, *, guest_socket: str) -> None:
    """Serve one session until the broker closes the channel. For a process of its own, in its main thread.

    Args:
        channel: Connected stream socket to the broker; frames both ways.
        guest_socket: Path of the guest plane's socket.
    """
    Worker(Channel(channel), GuestPlane(guest_socket)).serve()


class Worker:
    """One session's process: parts that know each other only through ``Current``."""

    def __init__(self, channel: Channel, plane: GuestPlane) -> None:
        self._channel, self._inbox = channel, Inbox(channel)
        self._lane_calls = LaneCalls(self._inbox)
        self._current = Current()
        self._calls = ToolCalls(plane, self._current)
        self._capture = Capture(self._current, self._prints_much)
        self._interrupts = Interrupts(self._current, self._calls.cut_waits)
        self._submit = Submit(self._current, self._cut_off)
        self._proxies = Proxies(self._calls)
        self._threads = ThreadTags(self._current)
        self._keeps_pipe = False
        self._repl = Repl()
        self._look_like_a_script()
        self._bind()
        self._threads.install()
        self._interrupts.restore()
        os.register_at_fork(after_in_child=self._after_fork)

    def serve(self) -> None:
        """Announce readiness and run executions until the channel closes."""
        self._channel.send({"type": "ready", "pid": os.getpid()})
        while True:
            try:
                header, blobs, fd, on_lane = self._inbox.receive(takes_lane=self._keeps_pipe)
            except (EOFError, ConnectionError):
                return
            if header["type"] == "secrets":
                os.environ.update(header["values"])
                self._channel.send({"type": "ready", "pid": os.getpid()})
                continue
            if header["type"] == "fork":
                self._fork(fd, header["copies"], header["ended"])
                continue
            self._calls.lane = self._lane_calls if on_lane and header.get("calls") is True else None
            if self._calls.lane is not None:
                self._calls.lane.open()
            ending = self._execute(header, blobs, fd)
            self._lane_calls.stop()
            printed = self._take_printed(header) if on_lane else None
            # Asked once more: later the broker may have read a part of it.
            told = printed is not None and self._is_soon(header)
            self._send(header["execution_id"], ending, printed or "", on_lane=told)
            del ending, blobs  # a large value must not stay until the next one
            self._calls.cut_waits()
            self._calls.let_go()
            if not self._keeps_pipe:
                # After the result, which nobody shall wait for longer than needed: what is printed meanwhile is thrown
                # away by the broker.
                self._capture.end()

    def _execute(self, header: dict[str, Any], blobs: Sequence[Blob], fd: int | None) -> Ending:
        execution = Execution(header["execution_id"])
        self._interrupts.restore()
        self._calls.made = False
        self._current.execution = execution  # from here on SIGINT counts
        self._capture.begin(fd, header.get("reader"), kept=header.get("pipe") == "kept", alone="sent_at" in header)
        self._threads.adopt_pools()
        self._repl.drop(header.get("drop", ()))
        self._rebind(header)
        ending = self._repl.run(execution, header["code"], header.get("variables", {}), blobs)
        if self._current.in_child:
            self._end_child(ending)
        self._current.execution = None  # threads that are left are stale now
        self._keeps_pipe = self._capture.flush() and "pipe" in header and self._capture.can_be_kept()
        return ending

    def _fork(self, fd: int | None, copies: list[int], ended: list[int]) -> None:
        """Make a copy of this process, which serves the channel ``fd``."""
        is_copy, error, lacks = False, None, []
        try:
            if fd is None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            branching.reap(ended)
            lacks = branching.not_kept({fd, *self._own_descriptors()}, copies, self._repl.waiting_tasks())
            is_copy = branching.fork()
        except OSError as failure:
            error = f"fork: {failure.strerror}"
        if is_copy and fd is not None:
            self._become_copy(fd)
        else:
            if fd is not None:
                os.close(fd)
            self._channel.send({"type": "forked", "not_kept": lacks, "error": error})
            self._inbox.ring()

    def _become_copy(self, fd: int) -> None:
        self._current.in_child = self._keeps_pipe = False  # a worker, where ``_after_fork`` saw a child
        self._inbox.close()
        self._calls.lane = None
        self._channel = Channel(socket.socket(fileno=fd))
        self._inbox = Inbox(self._channel)  # without a lane, which is the other one's
        for each in self._lane_calls.descriptors():
            os.close(each)
        self._lane_calls = LaneCalls(self._inbox)
        self._calls.lane = None
        self._capture.leave_pipe()
        branching.let_go_of_descriptors(self._own_descriptors())
        self._repl.forget_loop()  # now: closing it while it was shared would have changed the other one's
        self._channel.send({"type": "ready", "pid": os.getpid()})

    def _own_descriptors(self) -> tuple[int, ...]:
        return (
            *self._inbox.descriptors(),
            *self._lane_calls.descriptors(),
            *self._capture.descriptors(),
            *self._calls.descriptors(),
        )

    def _rebind(self, header: dict[str, Any]) -> None:
        fields, tools = header.get("output_fields"), header.get("tools")
        if fields is not None:
            self._submit.set_fields([OutputField.from_json(field) for field in fields])
        if tools is not None:
            self._proxies.set_tools(ToolDefinition.from_json(tool) for tool in tools)
            self._bind()

    def _bind(self) -> None:
        self._repl.bind({**self._proxies.functions, "SUBMIT": self._submit.function})

    def _take_printed(self, header: dict[str, Any]) -> str | None:
        """Return all that an execution printed, where the host may hear of its end before the broker does; else None.

        It may where the execution was over in a moment and left nothing but its value and a little output.
        """
        if not self._keeps_pipe or self._calls.made or not self._is_soon(header):
            return None
        return self._capture.take_back(header.get("output_bytes", 0))

    @staticmethod
    def _is_soon(header: dict[str, Any]) -> bool:
        """Tell whether the broker cannot have begun to read what an execution prints.

        Counted from when the host sent it, on the clock that all processes of a machine share.
        """
        return bool(0 <= time.monotonic() - header["sent_at"] < limits.LANE_REPLY_S)

    def _prints_much(self) -> None:
        """Have the broker read what an execution prints that came on the lane: the pipe would be full soon."""
        execution = self._current.execution
        if execution is not None:
            frame = b"".join(dump_frame({"type": "prints", "execution_id": execution.execution_id}))
            self._inbox.tell_broker(frame)
            self._inbox.ring()

    def _send(self, execution_id: str, ending: Ending, printed: str, *, on_lane: bool) -> None:
        header = {
            "type": "result",
            "execution_id": execution_id,
            "outcome": ending.outcome.value,
            "value": ending.value,
            "display": ending.display,
            "error": None if ending.error is None else ending.error.to_json(),
        }
        if printed:
            header["printed"] = printed
        if self._keeps_pipe:
            header["pipe"] = "kept"
        frame = self._inbox.lane_frame(header, ending.blobs) if on_lane else None
        if frame is not None:
            header["lane"] = True
        try:
            self._channel.send(header, ending.blobs)
        except FrameTooLarge:  # a giant value: its text will do
            self._channel.send({**header, "value": ending.display})
        if frame is not None:
            # Last: what the host does because of it, the broker sees after this execution's end.
            self._inbox.send_on_lane(frame)
        else:
            self._inbox.ring()

    def _cut_off(self) -> None:
        """SUBMIT holds: what is printed from now on goes nowhere, and nobody waits for a tool."""
        self._capture.end()
        self._calls.cut_waits()

    def _after_fork(self) -> None:
        """In a process that generated code forked: it is no worker, and shares no connection with one."""
        self._current.in_child = True
        self._inbox.close()
        self._capture.close_reader()
        self._calls.forget_connections()

    def _end_child(self, ending: Ending) -> None:
        """A forked child ran to the end of the code: it ends here, like a script."""
        if ending.error is not None:
            sys.stderr.write(ending.error.traceback)
        self._capture.flush()
        os._exit(0 if ending.error is None else 1)

    @staticmethod
    def _look_like_a_script() -> None:
        # As Python sets it: writing to a pipe without a reader is an error, not the end of the session.
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        sys.argv = [""]
        if "" not in sys.path:
            sys.path.insert(0, "")
