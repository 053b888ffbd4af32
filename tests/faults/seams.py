"""Where a fault strikes: the steps of a tool call, as seen from the host, and wrappers that strike there."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from broker.protocol.frames import Blob
from broker.protocol.messages import ToolResult
from host_client.broker_client import HttpBrokerClient, News
from host_client.journal import CallKey, CallRecord, Holder, SqliteJournal
from host_client.lane import Lane
from host_client.lane_user import LaneUser
from host_client.providers.base import SandboxHandle
from host_client.providers.fake import FakeProvider, RunningBroker
from host_client.transport import Reply, UnixSocketTransport


class Step(str, enum.Enum):
    """The life of a call on the host, in its order; ``TOLD_BROKER`` on the lane only, before its caller is told."""

    CLAIM_UNREAD = "claim unread"
    CLAIMED = "claimed"
    INTENDED = "intended"
    MID_TOOL = "mid-tool"
    RAN = "ran"
    RECORDED = "recorded"
    TOLD_BROKER = "told broker"
    REPLY_LOST = "reply lost"
    ACKNOWLEDGED = "acknowledged"


Strike = Callable[[Step], None]


class StrikingTransport(UnixSocketTransport):
    """Strikes when a claim has arrived, before anybody has read it."""

    def __init__(self, path: Path, strike: Strike) -> None:
        super().__init__(path)
        self._strike = strike

    def request(self, *args: Any, **keywords: Any) -> Reply:
        on_more = keywords.pop("on_more", None)
        if on_more is not None:
            keywords["on_more"] = lambda reply: on_more(self._struck(reply))
        return self._struck(super().request(*args, **keywords))

    def _struck(self, reply: Reply) -> Reply:
        if reply.header.get("claims"):
            self._strike(Step.CLAIM_UNREAD)
        return reply


class StrikingClient(HttpBrokerClient):
    """Strikes when the broker has an answer, before the host knows."""

    def __init__(self, path: Path, strike: Strike) -> None:
        super().__init__(StrikingTransport(path, strike))
        self._strike = strike

    def answer(self, call_id: str, result: ToolResult, blobs: Sequence[Blob], *, claim: bool = False) -> News | None:
        news = super().answer(call_id, result, blobs, claim=claim)
        self._strike(Step.REPLY_LOST)
        return news


def strike_on_lane(strike: Strike) -> None:
    """Strike also where calls come and are answered on the lane, in this whole process."""
    read, tell = LaneUser._called, Lane._send_soon

    def called(user: LaneUser, *args: Any) -> None:
        strike(Step.CLAIM_UNREAD)
        read(user, *args)

    def told(lane: Lane, frame: Sequence[Blob]) -> None:
        strike(Step.TOLD_BROKER)
        tell(lane, frame)

    LaneUser._called = called  # type: ignore[method-assign]
    Lane._send_soon = told  # type: ignore[method-assign]


class StrikingJournal(SqliteJournal):
    """Strikes around what is written."""

    def __init__(self, path: Path | str, strike: Strike) -> None:
        self._strike = strike
        super().__init__(path)

    def intend(self, holder: Holder, call: CallRecord) -> None:
        self._strike(Step.CLAIMED)
        super().intend(holder, call)
        self._strike(Step.INTENDED)

    def conclude(self, call: CallRecord) -> None:
        self._strike(Step.RAN)
        super().conclude(call)
        self._strike(Step.RECORDED)

    def delivered(self, call: CallKey) -> None:
        self._strike(Step.ACKNOWLEDGED)
        super().delivered(call)


class StrikingProvider(FakeProvider):
    """Gives out clients that strike."""

    def __init__(self, broker: RunningBroker, strike: Strike) -> None:
        super().__init__(broker)
        self._strike = strike

    def connect(self, handle: SandboxHandle) -> StrikingClient:
        return StrikingClient(handle.socket_path, self._strike)


def counting(counter: Path) -> Callable[[str], str]:
    """Return the work of a tool that counts its real runs in a file of the host, one byte each."""

    def effect(text: str) -> str:
        with counter.open("ab") as file:
            file.write(b"x")
        return text.upper()

    return effect


def count(counter: Path) -> int:
    """COUNT: how often the tool really ran."""
    return counter.stat().st_size if counter.exists() else 0
