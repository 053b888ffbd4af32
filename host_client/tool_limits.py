"""Holds calls of host tools to the limits that were declared: budget, places, time."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from host_client.tool_gate import ExecutionEnded, ExecutionScope, Gate
from host_client.tool_marks import ToolMarks, current_call
from host_client.tool_runner import await_result

log = logging.getLogger(__name__)

#: The gates that the calls around this one have entered: a tool that runs a nested RLM, which calls the tool again,
#: must not wait for itself.
_entered: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar("rlm_sandbox_gates", default=frozenset())


class ToolLimits:
    """The limits of one interpreter's tools, execution by execution."""

    def __init__(self) -> None:
        # Guards _scopes: an execution is in it from its request until its result is there.
        self._lock = threading.Lock()
        self._scopes: dict[str, ExecutionScope] = {}

    @contextlib.contextmanager
    def execution(self, execution_id: str) -> Iterator[None]:
        """Count calls of this execution inside of the ``with``; at its end, those that wait give up."""
        scope = ExecutionScope()
        with self._lock:
            self._scopes[execution_id] = scope
        try:
            yield
        finally:
            with self._lock:
                self._scopes.pop(execution_id, None)
            scope.end()

    def run(self, tool: str, marks: ToolMarks, call: Callable[[], Any]) -> Any:
        """Run one call of a tool within its limits and return its result, awaited if need be.

        Args:
            tool: Its name.
            marks: Its limits.
            call: Runs it.

        Raises:
            ToolBudgetExceeded, ExecutionEnded: It was not run.
            TimeoutError: It did not answer in time; it may go on.
            Exception: What it raises.
        """
        if not marks.limited:
            return settle(call())
        scope = self._scope()
        if marks.max_calls is not None:
            scope.spend(tool, marks.max_calls)
        give_up_at = None if marks.timeout_s is None else time.monotonic() + marks.timeout_s
        gate = marks.gate
        if gate is not None and id(gate) in _entered.get():
            gate = None
        if gate is not None:
            gate.enter(tool, scope, give_up_at)
        if give_up_at is None or marks.timeout_s is None:
            return _inside(gate, call, None)
        return _in_time(tool, marks.timeout_s, give_up_at, gate, call)

    def _scope(self) -> ExecutionScope:
        serving = current_call()
        if serving is None:  # called by the host itself: there is nothing to count in
            return ExecutionScope()
        with self._lock:
            scope = self._scopes.get(serving.execution_id)
        if scope is None:
            raise ExecutionEnded(f"{serving.tool}() was not run: its execution has ended")
        return scope


def settle(result: Any, give_up_at: float | None = None) -> Any:
    """Wait for an awaitable on this thread, and cancel it at ``give_up_at``; other results are returned as they are."""
    if give_up_at is not None and inspect.isawaitable(result):
        result = _until(result, give_up_at)
    return await_result(result)


async def _until(awaitable: Awaitable[Any], give_up_at: float) -> Any:
    try:
        return await asyncio.wait_for(awaitable, give_up_at - time.monotonic())
    except asyncio.TimeoutError:  # before Python 3.11 it is no TimeoutError
        raise TimeoutError from None


def _inside(gate: Gate | None, call: Callable[[], Any], give_up_at: float | None) -> Any:
    """Run a call that holds a place, and give the place back when it has ended."""
    if gate is None:
        return settle(call(), give_up_at)
    token = _entered.set(_entered.get() | {id(gate)})
    try:
        return settle(call(), give_up_at)
    finally:
        _entered.reset(token)
        gate.leave()


def _in_time(tool: str, timeout_s: float, give_up_at: float, gate: Gate | None, call: Callable[[], Any]) -> Any:
    """Run a call on a thread of its own, which is left alone where the call takes too long."""
    answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            answer.set_result(context.run(_inside, gate, call, give_up_at))
        except BaseException as error:  # a tool's KeyboardInterrupt or SystemExit belongs to who waits
            answer.set_exception(error)

    try:
        threading.Thread(target=work, name=f"rlm-sandbox tool {tool}", daemon=True).start()
    except BaseException:
        if gate is not None:
            gate.leave()
        raise
    if not concurrent.futures.wait((answer,), max(give_up_at - time.monotonic(), 0)).done:
        log.warning(
            "tool %s passed its limit of %g s; it goes on in its thread, its result is dropped", tool, timeout_s
        )
        raise TimeoutError(f"{tool}() did not answer within its {timeout_s:g} s on the host; it may still have effects")
    return answer.result()
