"""Tool calls by the lane, from any thread: of those who wait for an answer, one reads for all.

Each call is told to the broker first, on the channel, then to the host, on the lane, and the answer comes on the lane.
Where it does not come there, for whatever reason, the caller asks the broker, which knows of the call.
"""

from __future__ import annotations

import _thread
import contextlib
import enum
import os
import select
import threading
from typing import Any

from broker.protocol import frames
from broker.protocol.spinner import Spinner
from broker.worker.channel import Channel
from broker.worker.inbox import ONE, Inbox


class Unanswered(enum.Enum):
    """Why a tool call has no answer on the lane."""

    NOT_TOLD = "nobody knows of it"
    HOST_NOT_TOLD = "the broker knows of it, but the host may not"
    ELSEWHERE = "both know of it; the answer comes from the broker"
    CUT = "nobody waits any more: its execution ends"


Answer = dict[str, Any] | Unanswered


class _Waiter:
    """A call that waits."""

    __slots__ = ("_woken", "answer", "lane")

    def __init__(self, lane: Channel) -> None:
        self.lane = lane
        self.answer: Answer | None = None
        self._woken = _thread.allocate_lock()
        self._woken.acquire()

    def settle(self, answer: Answer) -> None:
        """Give it its answer, unless it has one."""
        if self.answer is None:
            self.answer = answer
        self.wake()

    def wait(self) -> None:
        """Wait until it is woken, or was since the last time."""
        self._woken.acquire()

    def wake(self) -> None:
        """Let it look: there is an answer, or nobody reads."""
        with contextlib.suppress(RuntimeError):  # it is awake
            self._woken.release()


class LaneCalls:
    """The calls of the execution that came on the lane.

    Args:
        inbox: Has the lane.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        # Guards _open together with what is added to _waiting: who waits was let in.
        self._gate = threading.Lock()
        self._open = False
        self._waiting: dict[str, _Waiter] = {}
        # Held by the one thread that reads; guards _torn and _polled.
        self._reader = threading.Lock()
        self._torn = False
        self._polled: tuple[Channel, select.poll] | None = None
        self._spinner = Spinner()
        # Wakes the reader for another reason than an answer; made when it is needed.
        self._alarm = -1

    def open(self) -> None:
        """Let calls in: an execution begins that came on the lane."""
        if self._alarm < 0:
            self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open = True

    def stop(self) -> None:
        """Let no more in, and wait until nobody reads: what comes next on the lane is the main thread's."""
        with self._gate:
            self._open = False
        if self._waiting:
            self.cut()
        with self._reader:
            if self._inbox.lane is not None:
                self._mend(self._inbox.lane)

    def cut(self) -> None:
        """Wake all who wait. Takes no lock: the signal handler calls it."""
        for waiter in list(self._waiting.values()):
            waiter.settle(Unanswered.CUT)
        if self._reader.locked():
            with contextlib.suppress(OSError):  # code that closes every descriptor has closed the worker's too
                os.write(self._alarm, ONE)

    def descriptors(self) -> tuple[int, ...]:
        """Return what is open as long as the worker lives."""
        return () if self._alarm < 0 else (self._alarm,)

    def ask(self, frame: bytes, key: str) -> Answer:
        """Tell broker and host of a call, and wait for the host's answer.

        Runs where an interrupt may strike at any instruction: then nothing is torn but the lane, which ends.

        Args:
            frame: At most ``limits.MAX_LANE_BYTES``, which leave as a whole or not at all.
            key: The call's, of which nobody has made another.
        """
        lane = self._inbox.lane
        if lane is None:
            return Unanswered.NOT_TOLD
        waiter = _Waiter(lane)
        with self._gate:
            if not self._open:
                return Unanswered.NOT_TOLD
            self._waiting[key] = waiter
        try:
            if not self._inbox.tell_broker(frame):
                return Unanswered.NOT_TOLD
            if not lane.send_whole(frame):
                return Unanswered.HOST_NOT_TOLD
            return self._answer_for(waiter)
        finally:
            del self._waiting[key]
            self._pass_on()

    def _answer_for(self, waiter: _Waiter) -> Answer:
        while (answer := waiter.answer) is None:
            if not self._reader.acquire(blocking=False):
                waiter.wait()
                continue
            try:
                self._read_for(waiter)
            except BaseException:
                self._mend(waiter.lane)
                raise
            finally:
                self._reader.release()
        return answer

    def _pass_on(self) -> None:
        """Have another one read who waits."""
        while self._waiting and not self._reader.locked():
            with contextlib.suppress(StopIteration, RuntimeError):  # the dict changes: look again
                next(each for each in self._waiting.values() if each.answer is None).wake()
                return
            if all(each.answer is not None for each in list(self._waiting.values())):
                return

    def _read_for(self, waiter: _Waiter) -> None:
        """Read for everybody until this one has its answer."""
        while waiter.answer is None:
            lane = self._inbox.lane
            if lane is not None:
                self._mend(lane)
            if lane is not waiter.lane:
                self._settle_lost(lane)
                return
            if not lane.has_more and not self._is_ready(lane):
                continue
            self._torn = True
            try:
                header, _, fd = lane.receive()
            except (EOFError, OSError, frames.FrameError):
                self._inbox.drop_lane()
                continue
            self._torn = False
            if fd is not None:
                os.close(fd)
            self._deliver(header)

    def _mend(self, lane: Channel) -> None:
        """End a lane of which an interrupt may have taken a part of somebody's answer away."""
        if self._torn:
            lane.end()
            self._torn = False

    def _is_ready(self, lane: Channel) -> bool:
        """Wait for the lane, the broker's word or an alarm; tell whether it was the lane alone."""
        if self._polled is None or self._polled[0] is not lane:
            poll = select.poll()
            for fd in (lane.fileno(), self._inbox.fileno(), self._alarm):
                poll.register(fd, select.POLLIN)
            self._polled = lane, poll
        ready = self._spinner.wait(self._polled[1])
        if self._alarm in ready:
            with contextlib.suppress(OSError):
                os.read(self._alarm, len(ONE))
            return False
        if self._inbox.fileno() in ready:
            self._inbox.skim()  # first: the broker may have ended the lane, and with it what is left in there
            return False
        return True

    def _deliver(self, header: dict[str, Any]) -> None:
        waiter = self._waiting.get(str(header.get("key")))
        if waiter is None or header.get("type") != "answer":
            return  # too late
        if "state" in header:
            waiter.settle(header)
        else:
            waiter.settle(Unanswered.HOST_NOT_TOLD if header.get("told") == "refused" else Unanswered.ELSEWHERE)

    def _settle_lost(self, lane: Channel | None) -> None:
        """The lane that these were told on is gone."""
        for waiter in list(self._waiting.values()):
            if waiter.lane is not lane:
                waiter.settle(Unanswered.HOST_NOT_TOLD)
