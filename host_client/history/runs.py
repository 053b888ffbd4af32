"""One run under way: what it spends, and the rows that it leaves in the history."""

from __future__ import annotations

import base64
import functools
import itertools
import os
import threading
import time
from typing import Any

from host_client.errors import BudgetExceeded
from host_client.history.dspy_parts import Usage
from host_client.history.records import (
    DONE,
    EXTRACTED,
    FAILED,
    INTERRUPTED,
    OVER_BUDGET,
    RUNNING,
    CallRow,
    ExecutionRow,
    IterationRow,
    RunRow,
)
from host_client.history.texts import described, output_text
from host_client.history.writer import HistoryWriter, MakeRow
from host_client.masking import Masker
from host_client.results import ExecutionRecord
from host_client.spending import Account, accounts

#: Rows of one run; what comes after is counted, and not kept.
MAX_ROWS = 20_000
#: Rows of a run that no interpreter of ours has joined (yet).
_MAX_WAITING = 1_000


class Run(Account):
    """A run, as an account that collects what happens in it. Safe to use from many threads.

    Nothing is written before an interpreter joins it (``record_to``): a module that runs its code elsewhere leaves
    no trace.

    Args:
        module: Name of the module.
        signature: Its signature.
        inputs: Its arguments, of which only kinds and sizes are kept.
        call_id: DSPy's id of the call.
        module_id: Which module it is, by ``id()``.
    """

    def __init__(
        self,
        module: str,
        *,
        signature: str = "",
        inputs: dict[str, Any] | None = None,
        call_id: str | None = None,
        module_id: int = 0,
    ) -> None:
        super().__init__()
        self.id = base64.b32encode(os.urandom(5)).decode().lower()
        self.parent = current_run()
        self.call_id, self.module_id = call_id, module_id
        self.module, self.signature = module, signature
        self.inputs = {name: described(value) for name, value in (inputs or {}).items()}
        self.iteration = 0
        self._last_kind = ""
        self._began_at = time.time()
        self._executions, self._calls = itertools.count(1), itertools.count(1)
        self._executed = self._rows = 0
        self._maskers: tuple[Masker, ...] = ()
        # Guards the two below: a row goes to the writer, or waits for it.
        self._lock = threading.Lock()
        self._writer: HistoryWriter | None = None
        self._waiting: list[MakeRow] = []

    def record_to(self, writer: HistoryWriter) -> None:
        """Write what has happened and what will; does nothing the second time."""
        if self._writer is not None:
            return
        if self.parent is not None:
            self.parent.record_to(writer)
        with self._lock:
            self._writer = writer
            waiting, self._waiting = self._waiting, []
        began = self._row(RUNNING)
        for make in [lambda: began, *waiting]:
            writer.put(make, self.mask)

    def hide(self, masker: Masker) -> None:
        """Mask a session's secrets in all that is written from now on, also in the runs around this one."""
        if masker and masker not in self._maskers:
            self._maskers = (*self._maskers, masker)
            if self.parent is not None:
                self.parent.hide(masker)

    def mask(self, text: str) -> str:
        """Return a text without secrets."""
        for masker in self._maskers:
            text = masker.text(text)
        return text if self.parent is None else self.parent.mask(text)

    def step_began(self) -> int:
        """Begin the next iteration and return its number."""
        self.iteration += 1
        return self.iteration

    def step_ended(
        self, number: int, began_at: float, duration_s: float, outputs: Any, error: BaseException | None
    ) -> None:
        """Record an iteration: what the model wrote, or why it wrote nothing."""
        code = _field(outputs, "code", "generated_code")
        self._last_kind = "answer" if code is None else "action"
        kind = self._last_kind
        self._put(
            lambda: IterationRow(
                run_id=self.id,
                number=number,
                kind=kind,
                started_at=began_at,
                duration_s=duration_s,
                reasoning=_field(outputs, "reasoning"),
                code=code,
                error=None if error is None else error_text(error),
            )
        )

    def executed(
        self, code: str, session_id: str | None, duration_s: float, record: ExecutionRecord | None, error: str | None
    ) -> None:
        """Record an execution that has just ended, in as little time as can be.

        Args:
            code: What ran.
            session_id: Where.
            duration_s: Seen by the host.
            record: What came of it, or None where it never ran, or nobody knows.
            error: What was raised, beginning with its name.
        """
        number = self._executed = next(self._executions)
        began_at = time.time() - duration_s
        where = (self.id, number, self.iteration, session_id)
        self._put(functools.partial(_execution_row, where, began_at, duration_s, code, record, error))

    def tool_called(
        self, tool: str, duration_s: float, given: dict[str, Any], result: Any, kept: bool, error: str | None
    ) -> None:
        """Record a call of a tool that has just ended, in as little time as can be.

        Args:
            tool: Its name.
            duration_s: How long it took.
            given: Its arguments.
            result: What it returned.
            kept: Whether the result is recorded, not only its size.
            error: What it raised.
        """
        when = (time.time() - duration_s, duration_s)
        where = (self.id, next(self._calls), self.iteration)
        self._put(functools.partial(_tool_row, where, when, tool, given, result, kept, error))

    def model_called(
        self,
        *,
        model: str,
        via: str,
        duration_s: float,
        messages: list[dict[str, Any]],
        answer: list[str] | None,
        used: Usage,
        error: BaseException | None,
    ) -> None:
        """Record a call of a model that has just ended."""
        run_id, number, iteration = self.id, next(self._calls), self.iteration
        began_at, text = time.time() - duration_s, None if error is None else error_text(error)
        self._put(
            lambda: CallRow(
                run_id=run_id,
                number=number,
                iteration=iteration,
                kind="model",
                name=model,
                via=via,
                started_at=began_at,
                duration_s=duration_s,
                prompt=messages,
                answer=answer,
                answer_chars=answer,
                tokens_in=used.tokens_in,
                tokens_out=used.tokens_out,
                cost=used.cost,
                cached=used.cached,
                error=text,
            )
        )

    def finish(self, outputs: Any = None, error: BaseException | None = None, *, ended: bool = True) -> None:
        """Record how it ended.

        Args:
            outputs: What the module returned, if it returned.
            error: What it raised.
            ended: Whether it came to an end of its own; else it was interrupted.
        """
        self.stop()
        if self._writer is None:
            self._waiting.clear()
            return
        row = self._row(self._outcome(error, ended), outputs, error)
        self._writer.put(lambda: row, self.mask)

    def _outcome(self, error: BaseException | None, ended: bool) -> str:
        if error is not None:
            if not isinstance(error, Exception):  # Ctrl-C, or a cancelled task
                return INTERRUPTED
            return OVER_BUDGET if isinstance(error, BudgetExceeded) else FAILED
        if not ended:
            return INTERRUPTED
        return EXTRACTED if self.module == "RLM" and self._last_kind == "answer" else DONE

    def _row(self, outcome: str, outputs: Any = None, error: BaseException | None = None) -> RunRow:
        return RunRow(
            id=self.id,
            parent_id=None if self.parent is None else self.parent.id,
            module=self.module,
            signature=self.signature,
            inputs=self.inputs,
            started_at=self._began_at,
            duration_s=None if outcome == RUNNING else self.seconds,
            outcome=outcome,
            outputs=_fields(outputs),
            error=None if error is None else error_text(error),
            iterations=self.iteration,
            executions=self._executed,
            calls=self.calls,
            tokens=self.tokens,
            cost=self.cost,
            unpriced=self.unpriced,
            process=os.getpid(),
        )

    def _put(self, make: MakeRow) -> None:
        """Leave a row to the background, which also makes it: whoever waits for this has code to run."""
        self._rows += 1
        if self._rows > MAX_ROWS:
            return
        writer = self._writer
        if writer is None:
            with self._lock:
                if self._writer is None:
                    if len(self._waiting) < _MAX_WAITING:
                        self._waiting.append(make)
                    return
                writer = self._writer
        writer.put(make, self.mask)


def current_run() -> Run | None:
    """Return the innermost run that is under way in this context."""
    for account in reversed(accounts.get()):
        if isinstance(account, Run):
            return account
    return None


def _tool_row(
    where: tuple[str, int, int],
    when: tuple[float, float],
    tool: str,
    given: dict[str, Any],
    result: Any,
    kept: bool,
    error: str | None,
) -> CallRow:
    run_id, number, iteration = where
    return CallRow(
        run_id=run_id,
        number=number,
        iteration=iteration,
        kind="tool",
        name=tool,
        via="",
        started_at=when[0],
        duration_s=when[1],
        prompt=given,
        answer=result if kept else None,
        answer_chars=result,
        tokens_in=0,
        tokens_out=0,
        cost=None,
        cached=False,
        error=error,
    )


def _execution_row(
    where: tuple[str, int, int, str | None],
    began_at: float,
    duration_s: float,
    code: str,
    record: ExecutionRecord | None,
    error: str | None,
) -> ExecutionRow:
    run_id, number, iteration, session_id = where
    return ExecutionRow(
        run_id=run_id,
        number=number,
        iteration=iteration,
        session_id=session_id,
        started_at=began_at,
        duration_s=duration_s,
        sandbox_s=None if record is None else record.duration_s,
        outcome=record.outcome.value if record is not None else (error or "").partition(":")[0],
        code=code,
        output="" if record is None else output_text(record),
        error=error,
    )


def error_text(error: BaseException) -> str:
    """Return an error as one text, whatever its ``__str__`` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _field(outputs: Any, *names: str) -> str | None:
    for name in names:
        value = getattr(outputs, name, None) if outputs is not None else None
        if value is not None and not callable(value):
            return str(getattr(value, "code", value))
    return None


def _fields(outputs: Any) -> dict[str, Any] | None:
    items = getattr(outputs, "items", None)
    if outputs is None or not callable(items):
        return None
    return {str(name): value for name, value in items() if name not in ("trajectory", "final_reasoning")}
