"""An interpreter's side of history and budgets: what it asks before code or a tool runs, what it tells afterwards."""

from __future__ import annotations

import math
import sys
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from host_client import budgets, spending
from host_client.budgets import GRACE_EXECUTIONS, GRACE_S, Budget, budget
from host_client.history import observer, store
from host_client.history.records import NO_MODULE
from host_client.history.runs import Run, current_run, error_text
from host_client.history.writer import HistoryWriter, writer_for

if TYPE_CHECKING:
    from host_client.interpreter import SandboxInterpreter

Execute = Callable[[str, "dict[str, Any] | None"], Any]

_BUDGET = budget.__name__


class Watch:
    """What one interpreter tells. With the history off and no budget around, none of it does anything.

    Args:
        owner: The interpreter.
        limits: Its budget for each run, or None.
    """

    def __init__(self, owner: SandboxInterpreter, limits: Budget | None) -> None:
        self._owner: Callable[[], SandboxInterpreter | None] = weakref.ref(owner)
        self._limits = limits
        path = store.path_of(owner.settings.history)
        self._writer = None if path is None else writer_for(path)
        self._on = self._writer is not None or limits is not None
        # What it works for now; its own run, where no module is around; and runs that end with the interpreter.
        self._run: Run | None = None
        self._own: Run | None = None
        self._ending: list[Run] = []
        self._let_go: weakref.finalize[..., Any] | None = None
        # Executions since the budgets of this account were used up.
        self._grace_of: spending.Account | None = None
        self._grace = 0
        self._offered = False
        self._masked: tuple[Any, Any] = (None, None)
        if self._on:
            observer.install()
            run, late = observer.run_here()
            if run is not None:
                if late:
                    spending.open_account(run)
                    self._ending.append(run)
                self._enter(run)

    def execute(self, run: Execute, code: str, variables: dict[str, Any] | None) -> Any:
        """Run code, within what is left, and record it.

        Raises:
            BudgetExceeded: Nothing is left, nor of the grace; it did not run.
            BaseException: What ``run`` raises.
        """
        opened = spending.accounts.get()
        if not self._on and not opened:
            return run(code, variables)
        joined = self._join()
        if joined is None or joined is not self._own:
            return self._limited(run, code, variables, joined, opened)
        opened = (*opened, joined)
        token = spending.accounts.set(opened)
        try:
            return self._limited(run, code, variables, joined, opened)
        finally:
            spending.accounts.reset(token)

    def tool(self, name: str, args: list[Any], kwargs: dict[str, Any], call: Callable[[], Any]) -> Any:
        """Call a tool, within what is left, and record it.

        Raises:
            BudgetExceeded: For generated code to read; the tool was not called.
            BaseException: What the tool raises.
        """
        opened = spending.accounts.get()
        if not opened:
            return call()
        queries = spending.queries_of(name, args, kwargs)
        run = current_run() if self._writer is not None else None
        began = time.perf_counter()
        result, error = None, None
        try:
            if queries is not None or any(account.budgets for account in opened):
                budgets.reserve(name, queries)
            with spending.ServingTool(name, counted=queries is not None):
                result = call()
        except BaseException as raised:
            error = error_text(raised)
            raise
        finally:
            if run is not None:
                self._hide(run)
                given = {"args": args, "kwargs": kwargs}
                run.tool_called(name, time.perf_counter() - began, given, result, queries is not None, error)
        return result

    def timeout_s(self, wanted: float | None) -> float | None:
        """Return how long an execution may take: as long as wanted, or as is left."""
        if not spending.accounts.get():
            return wanted
        left = max(budgets.seconds_left(), GRACE_S)
        return wanted if left == math.inf else left if wanted is None else min(wanted, left)

    def close(self) -> None:
        """Note that the interpreter was shut down. It may be used again."""
        for run in self._ending:
            spending.close_account(run)
            if run is not self._own:  # DSPy does not tell how it ended, but shuts down while an error passes by
                run.finish(error=sys.exc_info()[1])
        self._ending[:] = [run for run in self._ending if run is self._own]
        if self._let_go is not None:
            self._let_go()
            if self._writer is not None:
                self._writer.join()
        self._let_go = self._run = self._own = None

    def _join(self) -> Run | None:
        """Find the run that this execution belongs to; the first time, see to its budget and its record."""
        run = current_run()
        if run is None and self._on:
            if self._own is None:
                self._own = Run(NO_MODULE)
                self._ending.append(self._own)
            run = self._own
        if run is not self._run and run is not None:
            self._enter(run)
        return run

    def _enter(self, run: Run) -> None:
        self._run = run
        observer.install()
        if self._limits is not None:
            fresh = self._limits.fresh()
            observer.watch_models(fresh)
            fresh.attach(run)
        if self._let_go is None:
            if self._writer is not None:
                # First: for somebody who stays it gathers, and opens its file when the first execution is over.
                self._writer.acquire()
            self._let_go = weakref.finalize(self, _end, self._ending, self._writer)
        if self._writer is not None:
            run.record_to(self._writer)

    def _limited(
        self,
        run: Execute,
        code: str,
        variables: dict[str, Any] | None,
        joined: Run | None,
        opened: tuple[spending.Account, ...],
    ) -> Any:
        for account in opened:
            if account.budgets:
                self._offer(True, variables)
                self._admit()
                return self._told(self._recorded(run, code, variables, joined))
        if self._offered:
            self._offer(False, variables)
        return self._recorded(run, code, variables, joined)

    def _offer(self, limited: bool, variables: dict[str, Any] | None) -> None:
        """Give the model ``budget()`` while something is limited, unless the user has something of that name."""
        owner = self._owner()
        assert owner is not None
        wanted = self._offered = limited and _BUDGET not in (variables or ())
        if wanted:
            owner.tools.setdefault(_BUDGET, budget)
        elif owner.tools.get(_BUDGET) is budget:
            del owner.tools[_BUDGET]

    def _admit(self) -> None:
        """Let an execution of a run that has used up its budget pass a few times, so that it can SUBMIT.

        Raises:
            BudgetExceeded: It had its chances; or the budget is that of a run around this one, which has them.
        """
        ended = budgets.ended()
        if ended is None:
            return
        account, error = ended
        if self._grace_of is not account:
            self._grace_of, self._grace = account, 0
        if spending.is_nested(account) or self._grace >= GRACE_EXECUTIONS:
            raise error
        self._grace += 1

    def _told(self, result: Any) -> Any:
        """Add to what a model reads that its run must end."""
        owner, ended = self._owner(), budgets.ended()
        if ended is None or owner is None or owner.output_fields is None or not isinstance(result, (str, type(None))):
            return result
        left = max(0, GRACE_EXECUTIONS - self._grace) if self._grace_of is ended[0] else GRACE_EXECUTIONS
        note = f"[{ended[1].message}: SUBMIT now what you have; {left} executions are left]"
        return note if not result else f"{result}\n{note}"

    def _recorded(self, run: Execute, code: str, variables: dict[str, Any] | None, joined: Run | None) -> Any:
        if joined is None or self._writer is None:
            return run(code, variables)
        owner = self._owner()
        assert owner is not None
        before = owner.last_result
        began = time.perf_counter()
        try:
            result = run(code, variables)
        except BaseException as error:
            self._note(owner, joined, code, time.perf_counter() - began, before, error_text(error))
            raise
        self._note(owner, joined, code, time.perf_counter() - began, before, None)
        return result

    def _note(
        self, owner: SandboxInterpreter, joined: Run, code: str, duration_s: float, before: Any, error: str | None
    ) -> None:
        self._hide(joined)
        record, session = owner.last_result, owner._session
        session_id = None if session is None else session.session_id
        joined.executed(code, session_id, duration_s, None if record is before else record, error)

    def _hide(self, run: Run) -> None:
        """Keep the session's secrets out of the run's record."""
        owner = self._owner()
        session = None if owner is None else owner._session
        masked_session, masked_run = self._masked
        if session is not None and (session is not masked_session or run is not masked_run):
            self._masked = (session, run)
            run.hide(session.masker)


def _end(ending: list[Run], writer: HistoryWriter | None) -> None:
    while ending:
        ending.pop().finish()
    if writer is not None:
        writer.release()
