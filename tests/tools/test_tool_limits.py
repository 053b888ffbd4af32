"""Claims about budget, places and time of host tools, without a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from host_client.tool_gate import ExecutionEnded, ToolBudgetExceeded
from host_client.tool_limits import ToolLimits
from host_client.tool_marks import CurrentCall, marks_of, serving, tool

WAIT_S = 10


@contextlib.contextmanager
def called(execution_id: str = "e-1") -> Iterator[None]:
    call = CurrentCall(call_id="c", key="k", attempt=1, execution_id=execution_id, tool="work")
    with serving(call):
        yield


def run(limits: ToolLimits, function: Callable[..., Any], execution_id: str = "e-1") -> Any:
    with called(execution_id):
        return limits.run("work", marks_of(function), function)


def test_a_budget_counts_by_execution_and_names_tool_and_number() -> None:
    work = tool(max_calls=2)(lambda: 1)
    limits = ToolLimits()
    with limits.execution("e-1"), limits.execution("e-2"):
        assert [run(limits, work), run(limits, work), run(limits, work, "e-2")] == [1, 1, 1]
        with pytest.raises(ToolBudgetExceeded, match=r"work\(\) may be called 2 times in one execution"):
            run(limits, work)
    with limits.execution("e-3"):
        assert run(limits, work, "e-3") == 1


def test_a_failed_call_counts_too() -> None:
    ran = []

    @tool(max_calls=1)
    def work() -> None:
        ran.append(1)
        raise KeyError("x")

    limits = ToolLimits()
    with limits.execution("e-1"):
        with pytest.raises(KeyError):
            run(limits, work)
        with pytest.raises(ToolBudgetExceeded, match="once"):
            run(limits, work)
    assert ran == [1]


def test_the_host_itself_may_call_a_limited_tool() -> None:
    work = tool(max_calls=1, timeout_s=WAIT_S, max_concurrent=1)(lambda: 1)
    limits = ToolLimits()
    assert [limits.run("work", marks_of(work), work) for _ in range(3)] == [1, 1, 1]


def test_a_call_that_comes_after_its_execution_does_not_run() -> None:
    work = tool(max_calls=1)(lambda: 1)
    limits = ToolLimits()
    with limits.execution("e-1"):
        pass
    with pytest.raises(ExecutionEnded):
        run(limits, work)


class Crowd:
    """A tool that counts how many are inside, and stays until it is let go."""

    def __init__(self, **options: Any) -> None:
        self.entered, self.go = threading.Semaphore(0), threading.Event()
        self._lock = threading.Lock()
        self.inside = self.most = 0
        self.tool = tool(**options)(self._work())

    def _work(self) -> Callable[[], None]:
        def work() -> None:
            with self._lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
            self.entered.release()
            self.go.wait(WAIT_S)
            with self._lock:
                self.inside -= 1

        return work


def test_places_are_shared_by_all_interpreters_of_the_process() -> None:
    crowd, one, other = Crowd(max_concurrent=2), ToolLimits(), ToolLimits()
    with one.execution("e-1"), other.execution("e-2"), ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(run, one, crowd.tool) for _ in range(3)]
        calls += [pool.submit(run, other, crowd.tool, "e-2") for _ in range(3)]
        assert crowd.entered.acquire(timeout=WAIT_S)
        assert crowd.entered.acquire(timeout=WAIT_S)
        crowd.go.set()
        for call in calls:
            call.result(WAIT_S)
    assert crowd.most == 2


def test_a_call_whose_execution_ends_while_it_waits_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd, limits, waits = Crowd(max_concurrent=1), ToolLimits(), threading.Event()
    gate = marks_of(crowd.tool).gate
    assert gate is not None
    wait = gate._changed.wait
    # Called with the gate's lock held, so that whoever sees the event cannot come before the wait.
    monkeypatch.setattr(gate._changed, "wait", lambda timeout: (waits.set(), wait(timeout)))
    with limits.execution("e-1"), ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, limits, crowd.tool)
        assert crowd.entered.acquire(timeout=WAIT_S)
        with limits.execution("e-2"):
            waiting = pool.submit(run, limits, crowd.tool, "e-2")
            assert waits.wait(WAIT_S)
        with pytest.raises(ExecutionEnded):
            waiting.result(WAIT_S)
        crowd.go.set()
        first.result(WAIT_S)
    assert crowd.most == 1
    assert not crowd.entered.acquire(blocking=False)


def test_a_nested_call_does_not_wait_for_the_one_around_it() -> None:
    limits = ToolLimits()
    depth = []

    @tool(max_concurrent=1, timeout_s=WAIT_S)
    def work() -> int:
        depth.append(1)
        return len(depth) if len(depth) == 3 else int(run(limits, work))

    with limits.execution("e-1"):
        assert run(limits, work) == 3


def test_a_slow_tool_ends_as_a_timeout_error_and_keeps_its_place_until_it_is_done() -> None:
    crowd, limits = Crowd(max_concurrent=1, timeout_s=0.05), ToolLimits()
    with limits.execution("e-1"):
        with pytest.raises(TimeoutError, match=r"work\(\) did not answer within its 0.05 s"):
            run(limits, crowd.tool)
        with pytest.raises(TimeoutError, match=r"work\(\) was not run: its 1 places were taken"):
            run(limits, crowd.tool)
        assert crowd.entered.acquire(timeout=WAIT_S)
        assert crowd.most == 1
        crowd.go.set()
        assert _eventually_runs(limits, crowd) is None


def _eventually_runs(limits: ToolLimits, crowd: Crowd) -> Any:
    """The place is free once the forgotten thread has ended, which nothing announces but the gate."""
    for _ in range(100):
        with contextlib.suppress(TimeoutError):
            return run(limits, crowd.tool)
    raise AssertionError("the place was never given back")


def test_an_async_tool_is_cancelled_at_its_limit() -> None:
    cancelled: Future[bool] = Future()

    @tool(timeout_s=0.5)  # a busy machine has begun it by then
    async def work() -> None:
        try:
            await asyncio.sleep(WAIT_S)
        except asyncio.CancelledError:
            cancelled.set_result(True)
            raise

    limits = ToolLimits()
    with limits.execution("e-1"), pytest.raises(TimeoutError):
        run(limits, work)
    assert cancelled.result(WAIT_S)


def test_a_tool_within_its_limit_gives_its_result_its_error_and_its_context() -> None:
    from host_client import current_call

    @tool(timeout_s=WAIT_S, max_concurrent=1)
    async def name() -> str:
        call = current_call()
        assert call is not None
        return call.tool

    @tool(timeout_s=WAIT_S)
    def fails() -> None:
        raise KeyError("x")

    @tool(timeout_s=WAIT_S, max_concurrent=1)
    def leaves() -> None:
        raise SystemExit(3)

    limits = ToolLimits()
    with limits.execution("e-1"):
        assert [run(limits, name), run(limits, name)] == ["work", "work"]
        with pytest.raises(KeyError):
            run(limits, fails)
        for _ in range(2):
            with pytest.raises(SystemExit):
                run(limits, leaves)
