"""A broker without a sandbox, for tests: it does what a script says, and notes what it was asked."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from broker.protocol.frames import Blob
from broker.protocol.messages import (
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
)
from broker.protocol.values import Decoder, Encoder
from host_client.broker_client import LATE_S, News
from host_client.errors import BrokerError, BrokerUnreachable, CallGone, SessionBusy, SessionLost, UnknownSandbox
from host_client.providers.base import SandboxHandle
from host_client.settings import SandboxSettings

_LEASE_S = 60.0


class ScriptedToolError(Exception):
    """What ``ScriptedExecution.call`` raises when the host's tool failed.

    Args:
        error: Name and message of its exception.
    """

    def __init__(self, error: ErrorInfo) -> None:
        super().__init__(f"{error.type}: {error.message}")
        self.error = error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What one execution gives.

    Attributes:
        output: Printed text.
        value: Of the last expression.
        display: How a REPL shows it; by default its ``repr``.
        submitted: Given to SUBMIT.
        error: Raised by the code; a ``SyntaxError`` counts as one of the source.
        outcome: Where it does not follow from the above, such as ``Outcome.TIMED_OUT``.
        session_lost: Why the namespace is gone.
        discarded_output_bytes: Printed beyond the limit.
        never_ends: Ends only when it is interrupted or the session is closed.
    """

    output: str = ""
    value: Any = None
    display: str | None = None
    submitted: Mapping[str, Any] | None = None
    error: BaseException | None = None
    outcome: Outcome | None = None
    session_lost: str | None = None
    discarded_output_bytes: int = 0
    never_ends: bool = False


class ScriptedExecution:
    """One execution, as a step that is a function sees it.

    Attributes:
        code: What was to be run.
        variables: What was sent with it, decoded.
        tools: The session's tools by name.
        output_fields: The session's fields of SUBMIT.
        request: The whole request.
    """

    def __init__(self, broker: ScriptedBroker, session: _Session, request: ExecuteRequest, variables: Any) -> None:
        self.code, self.variables, self.request = request.code, variables, request
        self.tools: dict[str, ToolDefinition] = dict(session.tools)
        self.output_fields = session.output_fields
        self._broker = broker

    def call(self, tool: str, *args: Any, **kwargs: Any) -> Any:
        """Call a tool of the host, as generated code does, and return its result.

        Raises:
            ScriptedToolError: The tool failed.
            NameError: There is no such tool.
        """
        if tool not in self.tools:
            raise NameError(f"name {tool!r} is not defined")
        return self._broker._call(self.request.execution_id, tool, args, kwargs)


ScriptedStep = Step | Callable[[ScriptedExecution], Step]


@dataclasses.dataclass
class _Session:
    tools: dict[str, ToolDefinition] = dataclasses.field(default_factory=dict)
    output_fields: tuple[OutputField, ...] = ()
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)
    running: str | None = None
    lost: str | None = None


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


class ScriptedBroker:
    r"""A ``BrokerClient`` and a ``SandboxProvider`` in one object, without Docker, process or socket.

        broker = ScriptedBroker([
            Step(output="3 chapters\n"),
            lambda execution: Step(value=execution.call("llm_query", "What is it about?")),
            Step(submitted={"answer": "whales"}),
        ])
        rlm = dspy.RLM("book -> answer", interpreter_factory=SandboxInterpreter.factory(provider=broker))
        assert rlm(book="...").answer == "whales"
        assert "SUBMIT" in broker.executions[-1].code

    Each execution takes the next step. A step that is a function runs on a thread of its own, and may call the host's
    tools; what it raises is raised by the "generated code". DSPy 3.4 runs a set-up of its own before the model's first
    code (its sub-agents): pass ``skip`` a function that recognises such code, and it takes no step.

    Args:
        steps: What the executions give, in order.
        skip: Tells whether some code takes no step and gives nothing; by default DSPy's own set-up.

    Attributes:
        executions: The executions so far, without the skipped ones.
        started: How many sandboxes were started.
        stopped: How many of them were stopped.
        death: What ``why_dead`` answers.
    """

    def __init__(
        self, steps: Iterable[ScriptedStep] = (), *, skip: Callable[[str], bool] = lambda code: "_dspy_host" in code
    ) -> None:
        self.executions: list[ScriptedExecution] = []
        self.started = self.stopped = 0
        self.death: str | None = None
        self._steps, self._skip = iter(steps), skip
        self._ids = itertools.count(1)
        # Guards everything below; notified at each change.
        self._changed = threading.Condition()
        self._sessions: dict[str, _Session] = {}
        self._running: dict[str, _Running] = {}

    # SandboxProvider

    def start(self, settings: SandboxSettings, *, name: str | None = None) -> SandboxHandle:
        """Count a start."""
        self.started += 1
        return SandboxHandle(
            sandbox_id=f"scripted-{self.started}", name=name or "scripted", socket_path=Path("scripted"), owned=True
        )

    def find(self, name: str) -> SandboxHandle:
        """Return the sandbox ``scripted``; there is no other."""
        if name != "scripted":
            raise UnknownSandbox(f"no running sandbox is called {name!r}")
        return SandboxHandle(sandbox_id="scripted-0", name=name, socket_path=Path("scripted"), owned=False)

    def why_dead(self, handle: SandboxHandle) -> str | None:
        """Return what the test said in ``death``."""
        return self.death

    def stop(self, handle: SandboxHandle) -> None:
        """Count a stop, and lose every session."""
        self.stopped += 1
        self._lose_all("shutdown")

    def connect(self, handle: SandboxHandle) -> ScriptedBroker:
        """Be the client of one's own sandboxes."""
        return self

    def die(self, reason: str) -> None:
        """Let the sandbox end now, for ``reason``: whoever waits meets a broker that is gone."""
        self.death = reason
        self._lose_all(reason)

    # BrokerClient

    def check(self) -> None:
        """Always of the right version."""

    def open_session(self) -> str:
        """Open a session."""
        with self._changed:
            session_id = f"s{next(self._ids)}"
            self._sessions[session_id] = _Session()
            return session_id

    def execute(
        self,
        session_id: str,
        request: ExecuteRequest,
        blobs: Sequence[Blob],
        wanted: ClaimRequest,
        *,
        late_s: float = LATE_S,
    ) -> News:
        """Take the next step; the same execution id again takes none."""
        with self._changed:
            session = self._session(session_id)
            if request.execution_id not in self._running:
                if session.running is not None:
                    raise SessionBusy("an execution is running", status=409)
                self._begin(session, request, blobs)
        return self.claim(session_id, wanted)

    def claim(self, session_id: str, wanted: ClaimRequest, *, late_s: float = LATE_S) -> News:
        """Wait for tool calls or for the end."""
        give_up_at = time.monotonic() + wanted.wait_s
        with self._changed:
            running = self._running[wanted.execution_id or ""]
            while running.result is None and not (running.queued and wanted.limit):
                self._session(session_id)
                left_s = give_up_at - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            return _news(wanted, running)

    def answer(self, call_id: str, result: ToolResult, blobs: Sequence[Blob]) -> None:
        """Hand an answer to the step that waits for it."""
        value = None if result.error else Decoder(blobs, arrays=True).decode(result.value)
        with self._changed:
            for running in self._running.values():
                if running.result is None and call_id in running.answers:
                    running.answers[call_id] = (result, value)
                    self._changed.notify_all()
                    return
        raise CallGone(f"the call {call_id} is over", status=410)

    def interrupt(self, session_id: str, execution_id: str) -> None:
        """End the execution as interrupted."""
        error = ErrorInfo(type="ExecutionInterrupted", message="the execution was interrupted by the host")
        self._end(execution_id, ExecutionResult(outcome=Outcome.INTERRUPTED, error=error))

    def close_session(self, session_id: str) -> None:
        """Forget the session."""
        with self._changed:
            if session_id in self._sessions:
                self._sessions[session_id].lost = "shutdown"
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing is open."""

    # Inside.

    def _session(self, session_id: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise BrokerError(f"no session {session_id}", status=404)
        if session.lost is not None:
            if self.death is not None:
                raise BrokerUnreachable("the scripted sandbox is dead")
            raise SessionLost(f"the session is lost: {session.lost}", reason=session.lost)
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
        execution = ScriptedExecution(self, session, request, variables)
        if self._skip(request.code):
            self._finish(execution, Step())
            return
        self.executions.append(execution)
        step = next(self._steps, None)
        if step is None:
            del self._running[request.execution_id]
            session.running = None
            raise BrokerError(f"the script has no step {len(self.executions)}, for this code:\n{request.code}")
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
            outcome=step.outcome or _outcome(step),
            output=step.output,
            discarded_output_bytes=step.discarded_output_bytes,
            value=value,
            display=step.display if step.display is not None or step.value is None else repr(step.value),
            error=_error(step),
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
            call_id = f"c{next(self._ids)}"
            claim = Claim(
                call_id=call_id,
                attempt=1,
                tool=tool,
                args=encoded[0],
                kwargs=encoded[1],
                execution_id=execution_id,
                lease_s=_LEASE_S,
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

    def _lose_all(self, reason: str) -> None:
        with self._changed:
            for session in self._sessions.values():
                session.lost = session.lost or reason
            self._changed.notify_all()


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


def _outcome(step: Step) -> Outcome:
    if step.submitted is not None:
        return Outcome.SUBMITTED
    if step.session_lost is not None:
        return Outcome.WORKER_DIED
    if step.error is None:
        return Outcome.OK
    return Outcome.SYNTAX_ERROR if isinstance(step.error, SyntaxError) else Outcome.RAISED


def _error(step: Step) -> ErrorInfo | None:
    if isinstance(step.error, ScriptedToolError):
        return step.error.error
    return None if step.error is None else ErrorInfo(type=type(step.error).__name__, message=str(step.error))
