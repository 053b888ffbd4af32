"""Claims about the threads that run tools."""

from __future__ import annotations

import os
import threading
import time

from host_client.tool_threads import ToolThreads

WAIT_S = 10


def _tool_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rlm-sandbox tool"]


def _run_and_wait(threads: ToolThreads) -> int | None:
    seen: list[int | None] = []
    done = threading.Event()
    threads.run(lambda: (seen.append(threading.get_ident()), done.set()))  # type: ignore[arg-type,func-returns-value]
    assert done.wait(WAIT_S)
    return seen[0]


def _become_idle(threads: ToolThreads, count: int) -> None:
    """A thread counts as idle a moment after its job's end, and tells nobody."""
    give_up_at = time.monotonic() + WAIT_S
    while len(threads._idle) < count:
        assert time.monotonic() < give_up_at
        os.sched_yield()


def test_threads_are_used_again() -> None:
    threads = ToolThreads()
    first = _run_and_wait(threads)
    _become_idle(threads, 1)
    assert _run_and_wait(threads) == first
    threads.close()


def test_a_hanging_job_does_not_keep_the_next_one_waiting() -> None:
    threads, release = ToolThreads(), threading.Event()
    threads.run(lambda: release.wait(WAIT_S) and None)
    _run_and_wait(threads)
    release.set()
    threads.close()


def test_a_failing_job_does_not_cost_its_thread() -> None:
    threads = ToolThreads()

    def fail() -> None:
        raise SystemExit

    threads.run(fail)
    _become_idle(threads, 1)
    _run_and_wait(threads)
    assert len(threads._threads) == 1
    threads.close()


def test_close_ends_idle_threads_at_once_and_busy_ones_with_their_job() -> None:
    before = set(_tool_threads())
    threads, release = ToolThreads(), threading.Event()
    _run_and_wait(threads)
    _become_idle(threads, 1)
    threads.run(lambda: release.wait(WAIT_S) and None)
    _run_and_wait(threads)
    _become_idle(threads, 1)
    threads.close()
    [busy] = set(_tool_threads()) - before
    release.set()
    busy.join(WAIT_S)
    assert not busy.is_alive()


def test_close_from_a_job_does_not_wait_for_itself() -> None:
    threads, done = ToolThreads(), threading.Event()

    def close() -> None:
        threads.close()
        done.set()

    threads.run(close)
    assert done.wait(WAIT_S)
    threads.close()
