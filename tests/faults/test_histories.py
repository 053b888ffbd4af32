"""Generated histories of queue and journal: hosts that claim, run, crash, wake up too late, and take over."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from broker.errors import BrokerError
from broker.output import Output
from broker.protocol.frames import Blob
from broker.protocol.messages import (
    CallState,
    Claim,
    ExecuteRequest,
    StartedCall,
    ToolCallRequest,
    ToolDefinition,
    ToolResult,
    Verdict,
)
from broker.session import Session
from broker.testing import FakeClock
from broker.tool_calls import TERMINAL, ToolCall
from host_client.attaching import settle
from host_client.call_recorder import CallRecorder, RunningRecord
from host_client.errors import CallGone, Fenced, JournalUnusable, LeaseExpired, SandboxError
from host_client.journal import CallRecord, Holder
from host_client.memory_journal import MemoryJournal

HISTORIES = 2_000
LEASE_S = 60.0


class NoWorker:
    """A worker that does nothing: the machine speaks for the generated code."""

    def execute(self, header: dict[str, Any], blobs: Sequence[Blob], *, max_output_bytes: int) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def take_output(self, rest: str, *, keep: bool) -> Output:
        return Output("", 0)

    def kill(self) -> None:
        pass


class FailingJournal(MemoryJournal):
    """Refuses to write while the test says so, and notes which outcomes it has ever held."""

    def __init__(self, clock: FakeClock, held: set[tuple[str, int]]) -> None:
        self.broken, self.held = False, held
        super().__init__(clock=clock)

    def intend(self, holder: Holder, call: CallRecord) -> None:
        self._check()
        super().intend(holder, call)

    def conclude(self, call: CallRecord) -> None:
        self._check()
        super().conclude(call)
        self.held.add((call.call_id, call.attempt))

    def _check(self) -> None:
        if self.broken:
            raise JournalUnusable("the disk is full")


class DirectClient:
    """The broker as one client sees it, without a wire: the same checks, the same order."""

    def __init__(self, session: Session, epoch: int) -> None:
        self._session, self.epoch = session, epoch

    def answer(self, call_id: str, result: ToolResult, blobs: Sequence[Blob], *, claim: bool = False) -> None:
        self._ask(lambda: self._session.tool_calls.finish(call_id, result, blobs))

    def resolve(self, call_id: str, attempt: int, verdict: Verdict) -> None:
        self._ask(lambda: self._session.tool_calls.resolve(call_id, attempt, verdict))

    def claim(self, limit: int, renew: Sequence[tuple[str, int]]) -> list[ToolCall]:
        def ask() -> list[ToolCall]:
            self._session.tool_calls.renew(renew, LEASE_S)
            return self._session.tool_calls.claim(limit=limit, lease_s=LEASE_S, start=True)

        return list(self._ask(ask))

    def _ask(self, ask: Any) -> Any:
        kinds: dict[str, type[SandboxError]] = {"fenced": Fenced, "call_gone": CallGone, "unknown_call": CallGone}
        try:
            self._session.check_epoch(self.epoch)
            return ask()
        except BrokerError as error:
            raise kinds.get(error.code, LeaseExpired)(error.message) from None


@dataclasses.dataclass(eq=False)
class Host:
    """One client: what it remembers is gone with a crash."""

    client: DirectClient
    recorder: CallRecorder
    crashed: bool = False


@dataclasses.dataclass(eq=False)
class Work:
    """One claim in the hands of one host, and how far it has come."""

    host: Host
    claim: Claim
    idempotent: bool
    record: RunningRecord | None = None
    result: ToolResult | None = None
    recorded: bool = False
    refused: bool = False


class Histories(RuleBasedStateMachine):
    """See the module."""

    works = Bundle("works")

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.wall = FakeClock(), FakeClock(1e9)
        self.ended: Counter[str] = Counter()
        self.terminal: dict[str, tuple[CallState, Any]] = {}
        self.runs: Counter[str] = Counter()
        self.calls: list[ToolCall] = []
        self.session = Session("s", 0, NoWorker(), clock=self.clock, on_call_ended=self._call_ended)
        tools = tuple(
            ToolDefinition(name=name, parameters=None, idempotent=name == "safe") for name in ("once", "safe")
        )
        self.session.execute(ExecuteRequest(execution_id="e", code="", tools=tools), ())
        self.held: set[tuple[str, int]] = set()
        self.journals = [FailingJournal(self.wall, self.held) for _ in range(2)]
        self.hosts: list[Host] = []
        self._join(self.journals[0], [])

    def _join(self, journal: FailingJournal, started: list[ToolCall]) -> None:
        holder = Holder(sandbox_id="b", session_id="s", epoch=self.session.epoch)
        host = Host(DirectClient(self.session, holder.epoch), CallRecorder(journal, holder, clock=self.wall))
        complete = journal.hold(holder)
        self._settle(started, host, journal, complete)
        self.hosts.append(host)

    def _call_ended(self, call: ToolCall) -> None:
        self.ended[call.call_id] += 1

    @rule(tool=st.sampled_from(["once", "safe"]))
    def submit(self, tool: str) -> None:
        """Generated code calls a tool."""
        key = str(len(self.calls))
        self.calls.append(self.session.submit(ToolCallRequest(key=key, execution_id="e", tool=tool), (), 0))

    @rule(target=works, which=st.integers(0, 5), limit=st.integers(1, 3), twice=st.booleans())
    def claim(self, which: int, limit: int, twice: bool) -> Any:
        """Any host that lives claims, old ones too; a claim may be delivered twice."""
        host = self.hosts[which % len(self.hosts)]
        if host.crashed:
            return multiple()
        try:
            taken = host.client.claim(limit, [])
        except Fenced:
            assert host is not self.hosts[-1]
            return multiple()
        claims = [
            Claim(
                call_id=call.call_id,
                attempt=call.attempt,
                tool=call.request.tool,
                args=[],
                kwargs={},
                execution_id="e",
                lease_s=LEASE_S,
                key=call.key,
            )
            for call in taken
        ]
        return multiple(*(Work(host, claim, claim.tool == "safe") for claim in claims for _ in range(1 + twice)))

    @rule(work=works)
    def begin(self, work: Work) -> None:
        """Record the intent; without it nothing runs."""
        if work.host.crashed or work.record is not None or work.refused:
            return
        try:
            work.record = work.host.recorder.begin(work.claim, idempotent=work.idempotent)
        except (Fenced, CallGone, JournalUnusable):
            work.refused = True

    @rule(work=works)
    def run(self, work: Work) -> None:
        """The tool runs."""
        if work.host.crashed or work.record is None or work.result is not None:
            return
        self.runs[work.claim.call_id] += 1
        work.result = ToolResult(attempt=work.claim.attempt, value=self.runs[work.claim.call_id])

    @rule(work=works)
    def conclude(self, work: Work) -> None:
        """Record the outcome; where that fails, nobody is told."""
        if work.host.crashed or work.result is None or work.recorded:
            return
        assert work.record is not None
        try:
            work.record.conclude(work.result, ())
            work.recorded = True
        except JournalUnusable:
            work.result, work.record, work.refused = None, None, True
            self._quietly(lambda: work.host.client.resolve(work.claim.call_id, work.claim.attempt, Verdict.UNKNOWN))

    @rule(work=works, acknowledged=st.booleans())
    def post(self, work: Work, acknowledged: bool) -> None:
        """Post the outcome: once, again, late, in any order; the reply may be lost."""
        if work.host.crashed or not work.recorded:
            return
        assert work.result is not None
        assert work.record is not None
        result, record = work.result, work.record
        self._quietly(lambda: work.host.client.answer(work.claim.call_id, result, ()))
        if acknowledged:
            record.delivered()

    @rule(which=st.integers(0, 5))
    def crash(self, which: int) -> None:
        """A host is killed."""
        self.hosts[which % len(self.hosts)].crashed = True

    @rule(elsewhere=st.booleans())
    def attach(self, elsewhere: bool) -> None:
        """A new host takes over, perhaps for an older one that still lives, perhaps with another journal."""
        self._join(self.journals[elsewhere], self.session.attach(None))

    def _settle(self, started: list[ToolCall], host: Host, journal: FailingJournal, complete: bool) -> None:
        told = [
            StartedCall(
                call_id=call.call_id,
                attempt=call.attempt,
                key=call.key,
                tool=call.request.tool,
                execution_id="e",
                idempotent=call.idempotent,
            )
            for call in started
        ]
        settle(told, "b", host.client, journal, complete=complete)  # type: ignore[arg-type]

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0, 200.0]))
    def wait(self, seconds: float) -> None:
        """Time passes: leases end."""
        self.clock.advance(seconds)
        self.session.tick()

    @rule(seconds=st.sampled_from([-1e7, 3_600.0, 1e8]))
    def wall_clock_jumps(self, seconds: float) -> None:
        """Somebody sets the clock."""
        self.wall.advance(seconds)
        for journal in self.journals:
            journal.prune()

    @rule(broken=st.booleans())
    def disk(self, broken: bool) -> None:
        """The disk is full, or has room again."""
        for journal in self.journals:
            journal.broken = broken

    @rule(state=st.sampled_from([CallState.CANCELLED, CallState.EXPIRED]))
    def execution_ends(self, state: CallState) -> None:
        """The execution is over."""
        self.session.tool_calls.close(state)

    def _quietly(self, ask: Any) -> None:
        with contextlib.suppress(Fenced, CallGone, LeaseExpired):
            ask()

    @invariant()
    def undeclared_tools_run_at_most_once(self) -> None:
        for call in self.calls:
            assert call.request.tool == "safe" or self.runs[call.call_id] <= 1

    @invariant()
    def every_call_ends_at_most_once_and_never_changes_then(self) -> None:
        for call in self.calls:
            assert self.ended[call.call_id] == (call.state in TERMINAL)
            if call.state in TERMINAL:
                outcome = (call.state, call.value)
                assert self.terminal.setdefault(call.call_id, outcome) == outcome

    @invariant()
    def generated_code_sees_only_what_a_journal_held(self) -> None:
        for call in self.calls:
            if call.state is CallState.DONE:
                assert (call.call_id, call.attempt) in self.held

    def teardown(self) -> None:
        """No call is lost in silence: with nobody left, each comes to its end by itself."""
        for _ in range(4):
            self.wait(200.0)
        for call in self.calls:
            assert call.state in TERMINAL or call.state is CallState.QUEUED
        self.session.close()
        assert all(self.ended[call.call_id] == 1 for call in self.calls)


def test_two_thousand_histories_hold_the_promises() -> None:
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=HISTORIES,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=False,
        ),
    )
