"""One scripted sandbox: what ``ScriptedBroker`` gives as a ``BrokerClient``."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker.protocol import limits
from broker.protocol.blob_file import as_bytes
from broker.protocol.frames import Blob
from broker.protocol.messages import (
    Attached,
    Claim,
    ClaimRequest,
    ErrorInfo,
    ExecuteRequest,
    ExecutionResult,
    Outcome,
    OutputField,
    Progress,
    ToolDefinition,
    ToolResult,
    Verdict,
)
from broker.protocol.values import Decoder, Encoder
from host_client.broker_client import LATE_S, News, SessionInfo, SnapshotInfo
from host_client.errors import BrokerError, BrokerUnreachable, CallGone, SessionBusy, SessionLost, UnknownSnapshot
from host_client.scripted_steps import ScriptedExecution, ScriptedStep, ScriptedToolError, Step, error_of, outcome_of


@dataclasses.dataclass
class _Session:
    tools: dict[str, ToolDefinition] = dataclasses.field(default_factory=dict)
    output_fields: tuple[OutputField, ...] = ()
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)
    running: str | None = None
    lost: str | None = None
    name: str | None = None
    secrets: tuple[str, ...] = ()
    epoch: int = 1
    keep: bool = False
    ttl_s: float | None = None
    snapshots: dict[str, tuple[SnapshotInfo, dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def info(self, session_id: str) -> SessionInfo:
        """Return it as a broker describes it."""
        return SessionInfo(
            session_id,
            self.name,
            self.epoch,
            self.lost,
            self.secrets,
            running=self.running,
            keep=self.keep,
            ttl_s=self.ttl_s,
        )


@dataclasses.dataclass
class _Running:
    session: _Session
    queued: deque[tuple[Claim, list[Blob]]] = dataclasses.field(default_factory=deque)
    answers: dict[str, tuple[ToolResult, Any] | None] = dataclasses.field(default_factory=dict)
    result: ExecutionResult | None = None
    blobs: Sequence[Blob] = ()

    @property
    def going_on(self) -> bool:
        """Whether it may still come to a result."""
        return self.result is None and self.session.lost is None


class ScriptedClient:
    """A ``BrokerClient`` for one scripted sandbox.

    Args:
        take_step: Returns the next step of the script, or raises ``BrokerError`` where there is none.
        is_dead: Tells whether nobody answers any more.
    """

    def __init__(self, take_step: Callable[[ScriptedExecution], ScriptedStep], is_dead: Callable[[], bool]) -> None:
        self._take_step, self._is_dead = take_step, is_dead
        self._ids = itertools.count(1)
        self._unique = os.urandom(4).hex()  # the journal tells calls apart by their ids
        # Guards everything below; notified at each change.
        self._changed = threading.Condition()
        self._sessions: dict[str, _Session] = {}
        self._running: dict[str, _Running] = {}

    def check(self) -> None:
        """Always of the right version."""

    def open_session(
        self,
        name: str | None = None,
        secrets: Mapping[str, str] | None = None,
        *,
        keep: bool = False,
        ttl_s: float | None = None,
    ) -> str:
        """Open a session; of the secrets only the names are kept, and no time passes in a script."""
        with self._changed:
            session_id = f"s{next(self._ids)}-{self._unique}"
            self._sessions[session_id] = _Session(name=name, secrets=tuple(secrets or ()), keep=keep, ttl_s=ttl_s)
            return session_id

    def rehearse(self, session_id: str, timeout_s: float) -> None:
        """A script's first execution is as fast as the others."""

    def sessions(self, *, timeout_s: float = 10.0, memory: bool = False) -> list[SessionInfo]:
        """Return the sessions."""
        with self._changed:
            return [each.info(key) for key, each in self._sessions.items()]

    def attach(self, session_id: str, epoch: int) -> Attached:
        """Hand a session over. The script has one client, so nothing was under way and nobody is fenced."""
        with self._changed:
            session = self._session(session_id)
            session.epoch = epoch + 1
            return Attached(epoch=session.epoch, execution_id=session.running, running=session.running is not None)

    def fork(self, session_id: str, count: int) -> list[str]:
        """Open sessions that hold the same kept values; what their code does, the script says."""
        with self._changed:
            parent = self._idle(session_id)
            forked = {f"s{next(self._ids)}-{self._unique}": parent.kept for _ in range(count)}
            for key, kept in forked.items():
                self._sessions[key] = _Session(kept=dict(kept), secrets=parent.secrets)
            return list(forked)

    def snapshot(self, session_id: str, name: str | None) -> SnapshotInfo:
        """Remember the kept values."""
        with self._changed:
            session = self._idle(session_id)
            number = next(self._ids)
            info = SnapshotInfo(f"n{number}-{self._unique}", name or f"snapshot-{number}", time.time())
            session.snapshots[info.snapshot_id] = info, dict(session.kept)
            return info

    def snapshots(self, session_id: str) -> list[SnapshotInfo]:
        """Return the snapshots."""
        with self._changed:
            return [info for info, _ in self._session(session_id).snapshots.values()]

    def drop_snapshot(self, session_id: str, snapshot_id: str) -> None:
        """Forget one."""
        with self._changed:
            self._session(session_id).snapshots.pop(snapshot_id, None)

    def roll_back(self, session_id: str, snapshot_id: str) -> None:
        """Go back to the kept values of then, without tools, as a worker does."""
        with self._changed:
            session = self._idle(session_id)
            if snapshot_id not in session.snapshots:
                raise UnknownSnapshot(f"the session {session_id} has no snapshot {snapshot_id!r}", status=404)
            session.kept = dict(session.snapshots[snapshot_id][1])
            session.tools, session.output_fields = {}, ()

    def resolve(self, call_id: str, attempt: int, verdict: Verdict) -> None:
        """Let the call fail: nobody knows how it ended."""
        error = ErrorInfo(type="ToolOutcomeUnknown", message="whether the tool finished is not known")
        self.answer(call_id, ToolResult(attempt=attempt, error=error), ())

    def execute(
        self,
        session_id: str,
        request: ExecuteRequest,
        blobs: Sequence[Blob | str],
        wanted: ClaimRequest,
        *,
        late_s: float = LATE_S,
        on_claims: Callable[[News], None] | None = None,
    ) -> News:
        """Take the next step; the same execution id again takes none."""
        with self._changed:
            session = self._session(session_id)
            if request.execution_id not in self._running:
                if session.running is not None:
                    raise SessionBusy("an execution is running", status=409)
                self._begin(session, request, as_bytes(blobs))
        return self.claim(session_id, wanted)

    def claim(
        self,
        session_id: str,
        wanted: ClaimRequest,
        *,
        late_s: float = LATE_S,
        on_claims: Callable[[News], None] | None = None,
    ) -> News:
        """Wait for tool calls or for the end."""
        give_up_at = time.monotonic() + wanted.wait_s
        with self._changed:
            execution_id = wanted.execution_id or self._session(session_id).running
            if execution_id is None:
                return News(Progress(execution_id=None, running=False), ())
            wanted = dataclasses.replace(wanted, execution_id=execution_id)
            running = self._running[execution_id]
            while running.result is None and not (running.queued and wanted.limit):
                self._session(session_id)
                left_s = give_up_at - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            return _news(wanted, running)

    def answer(self, call_id: str, result: ToolResult, blobs: Sequence[Blob], *, claim: bool = False) -> News | None:
        """Hand an answer to the step that waits for it."""
        value = None if result.error else Decoder(blobs, arrays=True).decode(result.value)
        with self._changed:
            for running in self._running.values():
                if running.result is None and call_id in running.answers:
                    running.answers[call_id] = (result, value)
                    self._changed.notify_all()
                    return None
        raise CallGone(f"the call {call_id} is over", status=410)

    def interrupt(self, session_id: str, execution_id: str) -> None:
        """End the execution as interrupted."""
        error = ErrorInfo(type="ExecutionInterrupted", message="the execution was interrupted by the host")
        self._end(execution_id, ExecutionResult(outcome=Outcome.INTERRUPTED, error=error))

    def detach(self, session_id: str) -> None:
        """Let go of a session; it stays."""

    def close_session(self, session_id: str, *, epoch: int | None = None, if_idle: bool = False) -> None:
        """Forget the session."""
        with self._changed:
            if session_id in self._sessions:
                self._sessions[session_id].lost = "shutdown"
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing is open."""

    def lose(self, reason: str) -> None:
        """End every session."""
        with self._changed:
            for session in self._sessions.values():
                session.lost = session.lost or reason
            self._changed.notify_all()

    def _session(self, session_id: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise BrokerError(f"no session {session_id}", status=404)
        if session.lost is not None:
            if self._is_dead():
                raise BrokerUnreachable("the scripted sandbox is dead")
            raise SessionLost(f"the session is lost: {session.lost}", reason=session.lost)
        return session

    def _idle(self, session_id: str) -> _Session:
        session = self._session(session_id)
        if session.running is not None:
            raise SessionBusy(f"the execution {session.running} is running in this session", status=409)
        return session

    def _begin(self, session: _Session, request: ExecuteRequest, blobs: Sequence[Blob]) -> None:
        decoder = Decoder(blobs, kept=session.kept, arrays=True)
        variables = {name: decoder.decode(value) for name, value in request.variables.items()}
        for key in request.drop:
            session.kept.pop(key, None)
        if request.tools is not None:
            session.tools = {tool.name: tool for tool in request.tools}
        if request.output_fields is not None:
            session.output_fields = request.output_fields
        self._running[request.execution_id] = _Running(session)
        session.running = request.execution_id
        execution = ScriptedExecution(request, variables, session.tools, session.output_fields, self._call)
        try:
            step = self._take_step(execution)
        except BrokerError:
            del self._running[request.execution_id]
            session.running = None
            raise
        if isinstance(step, Step):
            self._finish(execution, step)
        else:
            threading.Thread(target=self._play, args=(execution, step), name="scripted step", daemon=True).start()

    def _play(self, execution: ScriptedExecution, function: Callable[[ScriptedExecution], Step]) -> None:
        try:
            step = function(execution)
        except _Stopped:
            return
        except Exception as error:
            step = Step(error=error)
        self._finish(execution, step)

    def _finish(self, execution: ScriptedExecution, step: Step) -> None:
        if step.never_ends:
            return
        encoder = Encoder(listify=True)
        value = encoder.encode(dict(step.submitted) if step.submitted is not None else step.value, "value")
        result = ExecutionResult(
            outcome=step.outcome or outcome_of(step),
            output=step.output,
            discarded_output_bytes=step.discarded_output_bytes,
            value=value,
            display=step.display if step.display is not None or step.value is None else repr(step.value),
            error=error_of(step),
            session_lost=step.session_lost,
        )
        self._end(execution.request.execution_id, result, encoder.blobs)

    def _end(self, execution_id: str, result: ExecutionResult, blobs: Sequence[Blob] = ()) -> None:
        with self._changed:
            running = self._running.get(execution_id)
            if running is not None and running.result is None and running.session.lost is None:
                running.result, running.blobs = result, blobs
                running.session.running = None
                running.session.lost = running.session.lost or result.session_lost
            self._changed.notify_all()

    def _call(self, execution_id: str, tool: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        encoder = Encoder(listify=True)
        encoded = encoder.encode(list(args), "args"), encoder.encode(kwargs, "kwargs")
        with self._changed:
            running = self._running[execution_id]
            call_id = f"c{next(self._ids)}-{self._unique}"
            claim = Claim(
                call_id=call_id,
                attempt=1,
                tool=tool,
                args=encoded[0],
                kwargs=encoded[1],
                execution_id=execution_id,
                lease_s=limits.DEFAULT_LEASE_S,
            )
            running.answers[call_id] = None
            running.queued.append((claim, encoder.blobs))
            self._changed.notify_all()
            while (answer := running.answers[call_id]) is None and running.going_on:
                self._changed.wait()
            if answer is None or not running.going_on:
                raise _Stopped
        result, value = answer
        if result.error is not None:
            raise ScriptedToolError(result.error)
        return value


class _Stopped(BaseException):
    """The execution is over; unwinds the thread of a step that is a function."""


def _news(wanted: ClaimRequest, running: _Running) -> News:
    if running.result is not None:
        return News(Progress(execution_id=wanted.execution_id, running=False, result=running.result), running.blobs)
    claims: list[Claim] = []
    blobs: list[Blob] = []
    while running.queued and len(claims) < wanted.limit:
        claim, own = running.queued.popleft()
        first = len(blobs)
        blobs.extend(own)
        claims.append(dataclasses.replace(claim, blob_range=(first, len(blobs))))
    return News(Progress(execution_id=wanted.execution_id, running=True, claims=tuple(claims)), blobs)
